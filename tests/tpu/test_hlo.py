"""What a compiled program multiplies and sends, counted in its text: loops in full, fusions opened, groups read."""

import pytest

from tpu import aot, hlo

TEXT = """HloModule step, is_scheduled=true

%fused (p0: bf16[6,5], p1: bf16[5,7]) -> f32[6,7] {
  %p0 = bf16[6,5]{1,0:T(8,128)} parameter(0)
  %p1 = bf16[5,7]{1,0:T(8,128)} parameter(1)
  ROOT %dot.1 = f32[6,7]{1,0:T(8,128)} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%condition (state: (s32[], bf16[6,5])) -> pred[] {
  %limit = s32[]{:T(128)} constant(9)
  %state = (s32[], bf16[6,5]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (state.1: (s32[], bf16[6,5])) -> (s32[], bf16[6,5]) {
  %state.1 = (s32[], bf16[6,5]{1,0}) parameter(0)
  %x = bf16[6,5]{1,0} get-tuple-element(%state.1), index=1
  %w = bf16[5,7]{1,0} constant({...})
  %fusion.1 = f32[6,7]{1,0:T(8,128)S(1)} fusion(%x, %w), kind=kOutput, calls=%fused
  %gather.1 = f32[24,7]{1,0} all-gather(%fusion.1), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  ROOT %next = (s32[], bf16[6,5]{1,0}) tuple(%state.1, %x)
}

ENTRY %main (a: bf16[3,8,4], b: bf16[3,9,4]) -> f32[3,8,9] {
  %a = bf16[3,8,4]{2,1,0} parameter(0)
  %b = bf16[3,9,4]{2,1,0} parameter(1)
  %init = (s32[], bf16[6,5]{1,0}) tuple(%a, %b)
  %loop = (s32[], bf16[6,5]{1,0}) while(%init), condition=%condition, body=%body
  %sum.1 = f32[11]{0} all-reduce(%a), replica_groups={{0,1,2},{3,4,5}}, to_apply=%add
  %sum.2 = f32[13]{0} all-reduce(%a), replica_groups=[2,8]<=[16], to_apply=%add
  ROOT %conv = f32[3,8,9]{2,1,0} convolution(%a, %b), window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0oi->0bf
}
"""


def test_a_product_inside_a_fusion_inside_a_loop_counts_as_often_as_the_loop_runs():
    in_loop, batched = 9 * 2 * 6 * 5 * 7, 3 * 2 * 8 * 9 * 4
    assert hlo.Program(TEXT).total_flops() == in_loop + batched


def test_a_loop_whose_first_turns_stand_before_it_counts_the_rest():
    text = TEXT.replace("  %init =", "  %first = s32[] constant(2)\n  %copied = s32[] copy(%first)\n  %init =")
    program = hlo.Program(text.replace("tuple(%a, %b)", "tuple(%copied, %b)"))
    assert program.trips(program.computations["main"]["loop"]) == 7
    assert hlo.Program(TEXT).total_flops() - program.total_flops() == 2 * 2 * 6 * 5 * 7


def test_a_batched_product_written_as_a_dilated_convolution_counts_only_what_meets_the_input():
    program = hlo.Program(TEXT)
    convolution = program.computations["main"]["conv"]
    # 3 outputs, 3 window places each: of 9 pairs only the 3 on the diagonal stand on an entry of the input.
    assert program.flops("main", convolution) == 2 * 3 * 8 * 9 * 4


def test_collectives_are_counted_by_kind_and_group_with_loops_in_full():
    assert hlo.Program(TEXT).collectives() == {
        ("all-gather", 4): (9, 9 * 24 * 7 * 4),
        ("all-reduce", 3): (1, 11 * 4),
        ("all-reduce", 8): (1, 13 * 4),
    }


def test_bytes_in_the_cores_own_memory_are_not_bytes_of_hbm():
    shape = "(bf16[6,7]{1,0:T(8,128)S(1)}, f32[5]{0})"
    assert (hlo.size(shape), hlo.size(shape, hbm_only=True)) == (6 * 7 * 2 + 5 * 4, 5 * 4)


def test_a_text_without_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.Program("HloModule nothing")


def test_what_crosses_the_network_between_slices_is_read_off_its_receive():
    receive = (
        "  %recv.1 = (f32[12,8]{1,0}, u32[], token[]) recv(%after), channel_id=1, is_host_transfer=true, "
        'frontend_attributes={_xla_megascale_reduce_operation="SUM",_xla_megascale_transfer_type="ALL_REDUCE"}\n'
    )
    program = hlo.Program(TEXT.replace("  %sum.1 =", receive + "  %sum.1 ="))
    (sent,) = program.sends(program.computations["main"]["recv.1"])
    assert (sent.kind, sent.moved, sent.between_slices) == ("all-reduce", 12 * 8 * 4, True)
    plain = hlo.Program(TEXT.replace("  %sum.1 =", receive.replace("_xla_megascale_transfer_type", "x") + "  %sum.1 ="))
    assert plain.sends(plain.computations["main"]["recv.1"]) == []  # from the host, not from another slice


def test_a_loop_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match="length is unknown"):
        hlo.Program(TEXT.replace("constant(9)", "parameter(1)")).total_flops()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--config=experiments/none.py"], "there is no file"),
        (["--config=experiments/digits.py", "--mesh=data:4"], "is not AXIS=SIZE"),
    ],
)
def test_what_is_given_wrongly_is_told_before_anything_is_compiled(flags, told, capsys):
    assert aot.main([*flags, "--topology=v5e:2x2"]) == 2
    assert told in capsys.readouterr().err


def test_of_what_a_fusion_slices_or_updates_in_place_only_that_part_is_moved():
    program = hlo.Program(
        """HloModule m, is_scheduled=true

%fused (p: f32[50,8,128], i: s32[], u: f32[1,8,128]) -> f32[50,8,128] {
  %p = f32[50,8,128]{2,1,0:T(8,128)} parameter(0)
  %i = s32[] parameter(1)
  %u = f32[1,8,128]{2,1,0:T(8,128)} parameter(2)
  ROOT %next = f32[50,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%p, %u, %i, %i, %i)
}

%cut (q: f32[50,8,128], j: s32[]) -> f32[1,8,128] {
  %q = f32[50,8,128]{2,1,0:T(8,128)} parameter(0)
  %j = s32[] parameter(1)
  ROOT %part = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%q, %j, %j, %j), dynamic_slice_sizes={1,8,128}
}

ENTRY %main (a: f32[50,8,128], n: s32[], u: f32[1,8,128]) -> f32[50,8,128] {
  %a = f32[50,8,128]{2,1,0:T(8,128)} parameter(0)
  %n = s32[]{:S(6)} parameter(1)
  %u = f32[1,8,128]{2,1,0:T(8,128)} parameter(2)
  %taken = f32[1,8,128]{2,1,0:T(8,128)} fusion(%a, %n), kind=kLoop, calls=%cut
  ROOT %put = f32[50,8,128]{2,1,0:T(8,128)} fusion(%a, %n, %u), kind=kLoop, calls=%fused
}
"""
    )
    row = 8 * 128 * 4
    for name in ("taken", "put"):  # read once, written once
        assert program.traffic("main", program.computations["main"][name]) == 2 * row


def test_sizes_are_rounded_up_to_the_tile_they_lie_in():
    assert hlo.size("bf16[5,96]{1,0:T(8,128)(2,1)}") == 5 * 96 * 2
    assert hlo.size("bf16[5,96]{1,0:T(8,128)(2,1)}", padded=True) == 8 * 128 * 2
    assert hlo.size("bf16[5,96]{0,1:T(8,128)(2,1)}", padded=True) == 96 * 128 * 2  # the other way round


@pytest.mark.parametrize(
    "attributes, want",
    [
        ("replica_groups=mesh['a'=2,'b'=3] {'a'}, x", (0, 3)),
        ("replica_groups=mesh['a'=2,'b'=3] {'b'}, x", (0, 1, 2)),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=3], device_ids=([3,2]T(1,0)) {'b'}, x", (0, 1)),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=3], device_ids=([3,2]T(1,0)) {'c'}, x", (0, 2, 4)),
        ("replica_groups=mesh['a'=2,'b'=3], device_ids=([6]) {'a','b'}, x", (0, 1, 2, 3, 4, 5)),
        ("replica_groups=[3,2]<=[2,3]T(1,0), x", (0, 3)),
        ("replica_groups={{0,4},{1,5}}, x", (0, 4)),
        ("source_target_pairs={{0,2},{2,0}}, x", (0, 2)),
        ("dimensions={0}", ()),
    ],
)
def test_a_group_is_read_in_each_spelling(attributes, want):
    assert hlo.group(attributes) == want


def test_a_line_of_source_is_the_innermost_of_ours_but_for_helpers():
    text = TEXT.replace(
        "HloModule step, is_scheduled=true\n",
        """HloModule step, is_scheduled=true

FileNames
1 "/somewhere/pe_jax/models/layers.py"
2 "/somewhere/site-packages/flax/nnx.py"

FunctionNames
1 "MLP.__call__"
2 "dot"
3 "Dense.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=83 end_line=83 column=12 end_column=77}
2 {file_name_id=2 function_name_id=2 line=7 end_line=9 column=12 end_column=77}
3 {file_name_id=1 function_name_id=3 line=44 end_line=44 column=12 end_column=77}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=3 parent_frame_id=1}
3 {file_location_id=2 parent_frame_id=2}
""",
    ).replace("to_apply=%add\n", 'to_apply=%add, metadata={op_name="jit(f)/add" stack_frame_id=3}\n', 1)
    program = hlo.Program(text)
    assert program.source(program.computations["main"]["sum.1"]) == "pe_jax/models/layers.py:83"
    assert program.source(program.computations["main"]["sum.2"]) == "the compiler's own"


def test_an_instruction_with_its_authors_notes_on_lines_of_their_own_does_not_end_its_computation():
    line = "  %w = bf16[5,7]{1,0} constant({...})"
    noted = f'{line}, frontend_attributes={{kernel_metadata={{\n"note":"{{5}}"\n}}}}, metadata={{}}'
    text = TEXT.replace(line, noted)
    assert text != TEXT and hlo.Program(text).total_flops() == hlo.Program(TEXT).total_flops()
