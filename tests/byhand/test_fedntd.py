"""FedNTD against closed forms (Lee et al. 2022)."""

import copy
import math

import pytest
import torch
from small import bed, gradient, network, opened, same_training
from torch.nn.functional import cross_entropy

from fedkeel.algorithms.base import Algorithm
from fedkeel.algorithms.fedntd import FedNTD, not_true


def term(student, teacher, y, temperature=1.0) -> torch.Tensor:
    return not_true(torch.tensor(student), torch.tensor(teacher), torch.tensor(y), temperature)


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.0588915), (2.0, 0.0597584)])
@pytest.mark.parametrize("true", [-4.0, 0.0, 9.0])
def test_three_classes(temperature, expected, true):
    """Student (2/3, 1/3), teacher (1/2, 1/2): 1/2 log(3/4) + 1/2 log(3/2) = log(9/8) / 2, whatever the true logits."""
    value = term([[true, math.log(2), 0.0]], [[3 - true, 0.0, 0.0]], [0], temperature)
    assert value.item() == pytest.approx(expected, abs=1e-6)


def test_any_class_can_be_the_true_one():
    for y in range(3):
        student, teacher = [math.log(2), 0.0], [0.0, 0.0]
        student.insert(y, 5.0), teacher.insert(y, -5.0)
        assert term([student], [teacher], [y]).item() == pytest.approx(0.0588915, abs=1e-6)


def test_the_mean_is_over_samples():
    """Not over samples and classes: the value of two equal samples is that of one."""
    row, flat = [0.0, math.log(2), 0.0], [0.0, 0.0, 0.0]
    assert term([row, row], [flat, flat], [0, 0]).item() == pytest.approx(0.0588915, abs=1e-6)
    assert term([row, flat], [flat, flat], [0, 0]).item() == pytest.approx(0.0588915 / 2, abs=1e-6)


def test_the_direction_is_teacher_to_student():
    """KL((2/3, 1/3) || (1/2, 1/2)) = 2/3 log(4/3) + 1/3 log(2/3) = 0.0566330, the other way round."""
    value = term([[0.0, 0.0, 0.0]], [[0.0, math.log(2), 0.0]], [0])
    assert value.item() == pytest.approx(0.0566330, abs=1e-6)


def test_the_gradient():
    """tau (softmax of student - softmax of teacher) / B over the others, exactly zero for the true logit."""
    student = torch.tensor([[0.3, 1.0, -0.5, 0.2], [2.0, 0.0, 0.1, -1.0]], requires_grad=True)
    teacher = torch.tensor([[0.1, 0.0, 0.4, -0.2], [0.5, 0.3, -2.0, 1.0]])
    not_true(student, teacher, torch.tensor([2, 0]), 2.0).backward()
    assert student.grad[0, 2] == 0.0 and student.grad[1, 0] == 0.0
    for row, others in ((0, [0, 1, 3]), (1, [1, 2, 3])):
        p, q = ((logits[row, others] / 2).softmax(0) for logits in (student.detach(), teacher))
        assert torch.allclose(student.grad[row, others], 2 * (p - q) / 2, atol=1e-6)


def test_two_classes_leave_nothing_to_distil():
    student = torch.tensor([[0.3, 1.0]], requires_grad=True)
    value = not_true(student, torch.tensor([[2.0, -1.0]]), torch.tensor([1]), 1.0)
    value.backward()
    assert value.item() == 0.0 and not student.grad.any()


def test_huge_logits_stay_finite():
    assert term([[0.0, 500.0, -500.0]], [[0.0, -500.0, 500.0]], [0]).item() == pytest.approx(1000.0)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_without_the_term_it_is_fedavg_bit_for_bit(norm):
    same_training(bed(FedNTD(beta=0.0), norm=norm), bed(Algorithm(), norm=norm))


def test_the_first_step_distils_nothing():
    """Student and teacher are the same network: the gradient is the cross-entropy's."""
    ntd, avg = bed(FedNTD(beta=3.0), norm="none"), bed(Algorithm(), norm="none")
    local, batch = opened(ntd)
    assert ntd.method.loss(local, batch).item() == avg.method.loss(local, batch).item()
    assert torch.allclose(gradient(ntd, local, batch), gradient(avg, *opened(avg)), atol=1e-7)


def test_later_steps_do_and_in_proportion_to_beta():
    grads = []
    for beta in (0.0, 1.0, 2.0):
        it = bed(FedNTD(beta=beta), norm="none")
        local, batch = opened(it)
        local.params.add_(torch.linspace(-1, 1, len(local.params)))
        grads.append(gradient(it, local, batch))
    first, second = grads[1] - grads[0], grads[2] - grads[0]
    assert first.norm() > 1e-2
    assert torch.allclose(second, 2 * first, atol=1e-5)


def test_the_teacher_is_the_model_received_in_evaluation_mode():
    it = bed(FedNTD(beta=0.5, temperature=2.0))
    it.round()
    sent = it.server.params.clone()
    local, batch = opened(it)
    teacher = copy.deepcopy(local.model).eval()(batch.x)
    local.params.add_(torch.linspace(-1, 1, len(local.params)))
    me = copy.deepcopy(local.model).train()
    student = me(batch.x)
    expected = cross_entropy(student, batch.y) + 0.5 * not_true(student, teacher, batch.y, 2.0)
    assert it.method.loss(local, batch).item() == pytest.approx(expected.item(), rel=1e-6)
    it.method.loss(local, batch)  # the same teacher although the live statistics have moved
    assert local.scratch["received"][local.layout.trained :].equal(it.server.buffers)
    assert local.model.features[2].training
    before = int(it.server.counters["features.2.num_batches_tracked"])
    assert int(local.model.features[2].num_batches_tracked) == before + 2  # the student's passes
    assert torch.equal(it.server.params, sent)


def test_nothing_stays_and_nothing_more_crosses():
    it = bed(FedNTD())
    it.round()
    assert all(set(reply.state) == {"own"} and not reply.update.extra for reply in it.replies)


def test_switching_off_is_noticed():
    assert FedNTD(beta=0.0).off() == {"beta": 0.0}
    assert FedNTD().off() == {}


def test_a_run_with_two_classes_says_that_it_is_fedavg():
    assert FedNTD().idle(network(), 2).startswith("with 2 classes") and FedNTD().idle(network(), 3) == ""
