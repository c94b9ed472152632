"""The ElementwiseKernel forms: the same results as the formulas, also on strided and broadcast arrays."""

import pytest

from kernels import ACTIVATIONS, elementwise

from .checks import SHAPES, Backend, assert_close
from .references import ADAM_CASES, RTOL, SGD_CASES, SLOPE, VALUE, activation_inputs, optimizer_state
from .test_optimizer_steps import SIZES, _assert_adam, _assert_sgd

pytestmark = pytest.mark.gpu


@pytest.fixture
def cuda():
    cupy = pytest.importorskip("cupy")
    return Backend("cuda", cupy, elementwise)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bias_act(cuda, rng, activation):
    for B, N in SHAPES:
        z, bias, dy = activation_inputs(rng, B, N)
        u = z.astype("f8") + bias
        out, intact = cuda.outputs(B, N, offset=1)
        elementwise.bias_act(cuda.array(z), cuda.array(bias), activation, out=out)
        assert_close(out, VALUE[activation](u), RTOL[activation], magnitude=abs(u))
        intact()
        dz = elementwise.bias_act_backward(cuda.array(dy), cuda.array(z), activation, cuda.array(bias))
        assert_close(dz, dy * SLOPE[activation]((z + bias).astype("f8")), RTOL[activation], magnitude=abs(dy))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_strides_and_broadcasting(cuda, rng, activation):
    z, bias, dy = activation_inputs(rng, 33, 47)
    transposed = cuda.array(z.T).T
    u = z.astype("f8") + bias
    y = elementwise.bias_act(transposed, cuda.array(bias), activation)
    assert_close(y, VALUE[activation](u), RTOL[activation], magnitude=abs(u))
    every_second = elementwise.bias_act(cuda.array(z)[::2], cuda.array(bias[:1]), activation)
    u = z[::2].astype("f8") + bias[:1]
    assert_close(every_second, VALUE[activation](u), RTOL[activation], magnitude=abs(u))
    dz = elementwise.bias_act_backward(cuda.array(dy), transposed, activation)
    assert_close(dz, dy * SLOPE[activation](z.astype("f8")), RTOL[activation], magnitude=abs(dy))


@pytest.mark.parametrize("case", ADAM_CASES)
def test_adam(cuda, rng, case):
    for P in SIZES:
        for step in (1, 1000):
            _assert_adam(cuda, optimizer_state(rng, P, fresh=step == 1), step=step, **ADAM_CASES[case])


@pytest.mark.parametrize("case", SGD_CASES)
def test_sgd(cuda, rng, case):
    for P in SIZES:
        _assert_sgd(cuda, optimizer_state(rng, P, fresh=False)[:3], with_velocity=True, **SGD_CASES[case])
