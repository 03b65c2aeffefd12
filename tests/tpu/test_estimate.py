"""Seconds read off a schedule: what the core does, what goes on beside it, and what is waited for."""

import dataclasses

import pytest

from tpu import chips, hlo
from tpu.estimate import estimate

V5E = chips.CHIPS["TPU v5 lite"]
RING = chips.Wiring(V5E, tuple((0, x, y) for y in range(16) for x in range(16)), (16, 16))


def program(*lines: str) -> hlo.Program:
    body = "\n".join(f"  {line}" for line in lines)
    return hlo.Program(f"HloModule m, is_scheduled=true\n\nENTRY %main (a: f32[2]) -> f32[2] {{\n{body}\n}}\n")


SQUARE = "bf16[4096,4096]{1,0:T(8,128)(2,1)}"
INPUTS = (f"%a = {SQUARE} parameter(0)", f"%b = {SQUARE} parameter(1)")
DOT = f"%c = {SQUARE} dot(%a, %b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}"


def test_a_matrix_product_takes_its_flops_at_the_peak_or_what_the_compiler_expects_if_that_is_longer():
    matrix = 2 * 4096**3 / 197e12
    alone = estimate(program(*INPUTS, DOT), RING)
    assert alone.seconds == pytest.approx(dict.fromkeys(("roofline", "middle", "cycles"), matrix))
    assert alone.mfu(2 * 4096**3, V5E.peak)["middle"] == pytest.approx(1)
    slower = estimate(program(*INPUTS, DOT + ', backend_config={"estimated_cycles":"1500000"}'), RING)
    assert slower.seconds == pytest.approx({"roofline": matrix, "middle": 1e-3, "cycles": 1e-3})


def test_a_product_over_96_channels_takes_the_time_of_128():
    narrow = "bf16[4096,96]{1,0:T(8,128)(2,1)}"
    kept = SQUARE.replace("}", "S(1)}")
    dot = f"%c = {kept} dot(%a, %b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{1}}"
    found = estimate(program(f"%a = {narrow} parameter(0)", f"%b = {narrow} parameter(1)", dot), RING)
    assert found.seconds["roofline"] == pytest.approx(2 * 4096**2 * 128 / 197e12)


def test_elementwise_work_takes_its_bytes_and_the_compilers_cycles_only_for_the_pessimist():
    add = f'%c = {SQUARE} add(%a, %b), backend_config={{"estimated_cycles":"3000000"}}'
    found = estimate(program(*INPUTS, add), RING).seconds
    stream = 3 * 2 * 4096**2 / 819e9
    assert found == pytest.approx({"roofline": stream, "middle": stream, "cycles": 2e-3})


def test_what_lies_in_the_cores_memory_costs_no_hbm():
    inside = SQUARE.replace("}", "S(1)}")
    add = f"%c = {inside} add(%a, %b)"
    found = estimate(program(f"%a = {inside} parameter(0)", f"%b = {inside} parameter(1)", add), RING)
    assert found.seconds["roofline"] == 0 and found.seconds["middle"] == 0


GATHER = "replica_groups=mesh['axis_0'=16,'axis_1'=16] {'axis_1'}, dimensions={0}"


def test_a_collective_is_waited_for_and_one_started_before_the_work_is_hidden_behind_it():
    wire = 15 / 16 * 2 * 4096**2 / (2 * 45e9) + 8 * chips.HOP_SECONDS  # a ring of 16, both ways
    first = f"%a = {SQUARE} parameter(0)"
    plain = estimate(program(first, f"%g = {SQUARE} all-gather(%a), {GATHER}"), RING)
    assert plain.exposed == plain.seconds["middle"] == pytest.approx(wire)
    both = f"({SQUARE.replace('4096,', '256,', 1)}, {SQUARE})"
    started = (
        *INPUTS,
        f"%s = {both} all-gather-start(%a), {GATHER}",
        DOT,
        f"%d = {SQUARE} all-gather-done(%s)",
    )
    hidden = estimate(program(*started), RING)
    assert hidden.exposed == 0 and hidden.seconds["middle"] == pytest.approx(2 * 4096**3 / 197e12)
    assert hidden.collectives["all-gather"] == pytest.approx(wire)


@pytest.mark.parametrize(
    "wiring, group, ways",
    [
        (RING, range(16), 2),  # along one ring, both ways round
        (RING, range(256), 4),
        (chips.Wiring(V5E, tuple((0, x, y) for y in range(4) for x in range(8)), (8, 4)), range(8), 1),  # no ring
    ],
)
def test_the_links_that_a_group_has_are_those_of_the_dimensions_it_spans(wiring, group, ways):
    _, rate, _ = wiring.way(tuple(group))
    assert rate == ways * V5E.link_rate


def test_between_slices_the_network_of_the_data_centre_carries():
    two = dataclasses.replace(RING, coordinates=((0, 0, 0), (1, 0, 0)))
    assert two.way((0, 1))[1] == V5E.dcn_rate


def test_a_kernel_takes_what_its_author_told_and_the_pessimist_doubles_it():
    told = '"cost_estimate":{"flops":"1970000000000","transcendentals":"0","bytes_accessed":"9"}'
    call = f'%attention_h128.1 = {SQUARE} custom-call(%a), backend_config={{"custom_call_config":{{{told}}}}}'
    found = estimate(program(INPUTS[0], call), RING)
    assert found.seconds == pytest.approx({"roofline": 0.01, "middle": 0.01, "cycles": 0.02})
    assert found.kernel_flops == 1.97e12


def test_a_chip_that_nothing_is_known_of_is_refused():
    with pytest.raises(ValueError, match=r"nothing is known of 'TPU v99'; tpu/chips.py knows TPU v4"):
        chips.of([type("Device", (), {"device_kind": "TPU v99"})()])


def test_the_decoders_causal_kernel_multiplies_the_blocks_up_to_the_diagonal():
    shapes = "s8[1,1,1]{2,1,0}, bf16[3,4,2,1024,64]{4,3,2,1,0}, bf16[3,4,1024,64]{3,2,1,0}"
    notes = 'frontend_attributes={kernel_metadata={"xprof_metadata":"{\\"block_q\\": 256}"}}'

    def kernel(name):
        call = f"%{name} = {SQUARE} custom-call(%a, %b), operand_layout_constraints={{{shapes}}}, {notes}"
        return estimate(program(*INPUTS, call), RING).kernel_flops

    pairs = 3 * 4 * 2 * 1024 * (1024 + 256) / 2
    assert kernel("splash_mqa_fwd_residuals.1") == 2 * pairs * 64 * 2
    assert kernel("splash_mqa_dkv_no_residuals.1") == 2 * pairs * 64 * 5
    assert kernel("other.1") == 0
