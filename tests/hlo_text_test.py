"""Bytes of main memory, counted from programs written by hand."""

from benchmark import load

hlo_text = load("hlo_text")

HEAD = """HloModule example

FileNames
1 "abe_jax/train_step.py"

"""


def moved(text):
    return {each.name: each.moved for each in hlo_text.instructions(HEAD + text)}


def test_a_fusion_that_slices_an_operand_reads_the_slices():
    text = """\
%both (a: f32[100,8], b: f32[100,8]) -> f32[10,8] {
  %a = f32[100,8]{1,0} parameter(0)
  %b = f32[100,8]{1,0} parameter(1)
  %first = f32[10,8]{1,0} slice(%a), slice={[0:10], [0:8]}
  %last = f32[10,8]{1,0} slice(%a), slice={[90:100], [0:8]}
  %some = f32[10,8]{1,0} slice(%b), slice={[0:10], [0:8]}
  %all = f32[8]{0} reduce(%b), dimensions={0}
  ROOT %sum = f32[10,8]{1,0} add(%first, %last, %some, %all)
}

ENTRY %main (x: f32[100,8], y: f32[100,8]) -> f32[10,8] {
  %x = f32[100,8]{1,0} parameter(0)
  %y = f32[100,8]{1,0} parameter(1)
  ROOT %fusion = f32[10,8]{1,0} fusion(%x, %y), kind=kLoop, calls=%both
}
"""
    row = 8 * 4
    assert moved(text) == {"x": 0, "y": 0, "fusion": (20 + 100 + 10) * row}


def test_arrays_are_padded_to_tiles():
    text = """\
ENTRY %main (x: bf16[64,14,14,24], y: f32[300]) -> bf16[64,14,14,24] {
  %x = bf16[64,14,14,24]{3,0,2,1:T(8,128)(2,1)} parameter(0)
  %y = f32[300]{0:T(256)S(1)} parameter(1)
  ROOT %z = bf16[5,14,14,24]{3,0,2,1:T(8,128)(2,1)} fusion(%x, %y), kind=kLoop
}
"""
    (*_, z) = hlo_text.instructions(HEAD + text)
    assert z.moved == 2 * 14 * 14 * 24 * (64 + 5)
    assert z.moved_padded == 2 * 14 * 14 * 128 * (64 + 8)


def test_a_loop_runs_as_often_as_xla_says_and_each_trip_fills_a_row():
    text = """\
%goes_on (state: (s32[], bf16[5,100])) -> pred[] {
  %state = (s32[], bf16[5,100]{1,0}) parameter(0)
  ROOT %less = pred[] fusion(%state), kind=kLoop, calls=%less
}

%body (state: (s32[], bf16[5,100])) -> (s32[], bf16[5,100]) {
  %state = (s32[], bf16[5,100]{1,0}) parameter(0)
  %rows = bf16[5,100]{1,0} get-tuple-element(%state), index=1
  %new = bf16[100]{0} broadcast(), dimensions={}
  %filled = bf16[5,100]{1,0} dynamic-update-slice(%rows, %new)
  ROOT %next = (s32[], bf16[5,100]{1,0}) tuple(%filled)
}

ENTRY %main (x: bf16[5,100]) -> bf16[5,100] {
  %x = bf16[5,100]{1,0} parameter(0)
  %loop = (s32[], bf16[5,100]{1,0}) while(%x), condition=%goes_on, body=%body, TOLD
  ROOT %y = bf16[5,100]{1,0} get-tuple-element(%loop), index=1
}
"""
    told = 'backend_config={"known_trip_count":{"n":"5"}}'
    got = moved(text.replace("TOLD", told))
    assert got["new"] == 5 * 200
    assert got["filled"] == 5 * (200 + 200)
    assert got["loop"] == 0


def test_scratch_of_nvidias_libraries_does_not_count():
    text = """\
ENTRY %main (x: bf16[64,32], k: bf16[32,16]) -> bf16[64,16] {
  %x = bf16[64,32]{1,0} parameter(0)
  %k = bf16[32,16]{1,0} parameter(1)
  %y = (bf16[64,16]{1,0}, s8[33554432]{0}) custom-call(%x, %k), TARGET
}
"""
    told = 'custom_call_target="__cublas$lt$matmul"'
    size = 2 * (64 * 32 + 32 * 16 + 64 * 16)
    assert moved(text.replace("TARGET", told))["y"] == size
