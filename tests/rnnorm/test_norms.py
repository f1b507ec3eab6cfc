"""Specifications: frozen, equal by value, found by name."""

import dataclasses
import pickle

import pytest

from rnnorm import norms


@pytest.mark.parametrize("spec", [norms.Online(), norms.Layer(), norms.RMS()])
def test_frozen_and_equal_by_value(spec: norms.Spec) -> None:
    assert spec == type(spec)()
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert len({spec, type(spec)()}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.eps = 1.0  # type: ignore[misc]


def test_names() -> None:
    found = {name: norms.resolve(name) for name in norms.KINDS}
    assert {name: spec.kind for name, spec in found.items()} == {name: name for name in norms.KINDS}
    assert found["online"] == norms.Online()
    own = norms.Online(0.5, guard="clamp")
    assert norms.resolve(own) is own


def test_defaults_are_the_papers() -> None:
    online = norms.Online()
    assert (online.alpha_fwd, online.alpha_bwd) == (8191 / 8192, 31 / 32)
    assert (online.eps, online.affine, online.guard) == (1e-5, True, "scale")
    assert (norms.Layer().eps, norms.Layer().affine) == (1e-5, True)
    assert (norms.RMS().eps, norms.RMS().affine) == (1e-5, True)


@pytest.mark.parametrize("alpha", [1e-9, 0.5, 1, 1.0])
def test_alphas_up_to_one(alpha: float) -> None:
    assert norms.Online(alpha, alpha).alpha_fwd == alpha
