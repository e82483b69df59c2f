# SPDX-License-Identifier: Apache-2.0
"""Any dataclasses become locked ConfigDicts and come back; optional fields keep their type."""

from dataclasses import dataclass, field

import pytest

from apollo_jax.config_values import from_dict, override, to_config


@dataclass(frozen=True)
class Inner:
    a: int = 1


@dataclass(frozen=True)
class Outer:
    limit: int | None = None
    many: dict[str, Inner] = field(default_factory=dict)


def test_optional_fields_are_typed_and_may_be_cleared():
    values = to_config(Outer(many={"x": Inner(2)}))
    assert values.limit is None
    with pytest.raises(TypeError):
        values.limit = "text"
    override(values, "limit", "3")
    override(values, "many.x.a", "4")
    assert from_dict(Outer, values.to_dict()) == Outer(3, {"x": Inner(4)})
    override(values, "limit", "none")
    assert from_dict(Outer, values.to_dict()).limit is None


def test_configs_are_locked():
    values = to_config(Outer())
    with pytest.raises(AttributeError):
        values.lmit = 3
