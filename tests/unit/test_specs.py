"""QuantSpec: string form there and back, combinations, messages."""

from __future__ import annotations

import re

import numpy as np
import pytest

import corequant as cq
from corequant.formats import FormatKind
from corequant.specs import Granularity, QuantSpec, ScaleFormat, ScaleRounding, ScaleSearch


def random_format(generator):
    pick = generator.integers(0, 10)
    if pick == 0:
        e, m = int(generator.integers(1, 6)), int(generator.integers(0, 3))
        return cq.NumberFormat.minifloat(e, max(m, 2 - e), bias=int(generator.integers(-20, 20)))
    if pick == 1:
        table = np.unique(generator.standard_normal(generator.integers(2, 17)).astype(np.float32))
        return cq.NumberFormat.codebook(table if len(table) > 1 else [-1.0, 1.0])
    names = [n for n, f in cq.formats.items() if f.kind is not FormatKind.POWER]
    return cq.formats[names[generator.integers(len(names))]]


def random_spec(generator):
    """Any spec that has a meaning: draw fields until they fit together."""

    def pick(kind):
        members = list(kind)
        return members[generator.integers(len(members))]

    while True:
        granularity = pick(Granularity)
        scale_format = pick(ScaleFormat)
        grouped = granularity in (Granularity.GROUP, Granularity.TENSOR_GROUP)
        search = pick(ScaleSearch)
        percentile = float(generator.uniform(50, 100)) if generator.random() < 0.5 else None
        try:
            return QuantSpec(
                random_format(generator),
                granularity,
                int(generator.integers(1, 257)) if grouped else None,
                bool(generator.random() < 0.5),
                search,
                scale_format,
                pick(ScaleRounding) if generator.random() < 0.7 else None,
                percentile if search is ScaleSearch.PERCENTILE else None,
            )
        except cq.SpecError:
            continue


def test_ten_thousand_random_specs_come_back_from_their_strings():
    generator = np.random.default_rng(0)
    seen = set()
    for _ in range(10_000):
        spec = random_spec(generator)
        assert QuantSpec.parse(str(spec)) == spec
        seen.add((spec.scale_search, spec.scale_format, spec.granularity))
    assert len(seen) > 60


@pytest.mark.parametrize("name", list(cq.presets))
def test_presets_come_back_from_their_names(name):
    assert str(cq.presets[name]) == name
    assert QuantSpec.parse(name) == cq.presets[name]
    for part in ("mse", "ceil", "even", "percentile99.5"):
        if name == "nvfp4" and part in ("ceil", "even"):
            continue
        spec = QuantSpec.parse(f"{name}:{part}")
        assert QuantSpec.parse(str(spec)) == spec != cq.presets[name]


def test_presets_are_those_of_the_specification():
    wanted = {
        "mxfp4": (32, 4.25, 6.0),
        "mxfp6_e2m3": (32, 6.25, 7.5),
        "mxfp6_e3m2": (32, 6.25, 28.0),
        "mxfp8_e4m3": (32, 8.25, 448.0),
        "mxfp8_e5m2": (32, 8.25, 57344.0),
        "mxint8": (32, 8.25, 1.984375),
        "nvfp4": (16, 4.5, 6.0),
    }
    assert set(wanted) == set(cq.presets)
    for name, (size, bits, most) in wanted.items():
        spec = cq.presets[name]
        assert (spec.group_size, spec.format.maximum) == (size, most)
        assert spec.format.bits + spec.scale_bits / size == bits


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("intt4", "unknown format 'intt4', expected int2 to int8.*did you mean 'int4'"),
        ("mxfp5", "did you mean the preset 'mxfp4'"),
        ("e4m9", "a minifloat must have at least 1 exponent bit and 3 to 8 bits with its sign"),
        ("e2m1b300", "bias must keep the numbers of e2m1 in float32's normal range, got 300"),
        ("int4:grop128", "unknown part 'grop128' in 'int4:grop128'.*did you mean 'group128'"),
        ("int4:channel:token", "gives granularity twice, the second time as 'token'"),
        ("int4:group", "unknown part 'group'"),
        ("e2m1:asymmetric", "asymmetric needs an integer format, got e2m1"),
        ("float8_e8m0fnu", "must have a zero, got float8_e8m0fnu"),
        ("int4:e4m3", "scale_format 'e4m3' requires granularity 'tensor_group'"),
        ("int4:ceil", "scale_rounding of float32 scales must be nearest, got 'ceil'"),
        ("mxfp4:exact", "needs float scales, got 'e8m0'; 'mse' tries all"),
        ("mxfp4:four_over_six", "'four_over_six' needs nvfp4"),
        ("int4:asymmetric:exact", "'exact' must be symmetric"),
        ("e2m1:hqo", "'hqo' needs an integer format, got e2m1"),
        ("int4:percentile0", r"percentile must be a number in \(0, 100\], got 0.0"),
        ("codebook(1,0)", "a codebook must have 2 to 256 finite numbers, strictly ascending"),
        ("codebook(a)", "a codebook must list numbers between commas"),
        ("", "unknown format ''"),
    ],
)
def test_wrong_strings_say_what_was_expected(text, message):
    with pytest.raises(cq.SpecError) as caught:
        QuantSpec.parse(text)
    assert re.search(message, str(caught.value))


def test_replace_lets_defaults_follow():
    spec = QuantSpec.parse("int4:group32")
    assert str(spec.replace(scale_format="e8m0")) == "int4:group32:symmetric:e8m0"
    assert spec.replace(scale_search="percentile").percentile == 99.9
    assert spec.replace(scale_search="percentile").replace(scale_search="mse").percentile is None


def test_unknown_types_are_refused():
    with pytest.raises(TypeError, match="text must be a string, got int"):
        QuantSpec.parse(4)
    with pytest.raises(cq.SpecError, match="group_size must be a positive integer, got True"):
        QuantSpec("int4", "group", True)
    with pytest.raises(cq.SpecError, match=r"unknown granularity 'tensr'.*did you mean 'tensor'"):
        QuantSpec("int4", "tensr")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": None}, "format must be a NumberFormat or its name, got None"),
        ({"granularity": 3}, "granularity must be a Granularity or its name, got 3"),
        ({"symmetric": "asymmetric"}, "symmetric must be True or False, got 'asymmetric'"),
        ({"symmetric": None}, "symmetric must be True or False, got None"),
        ({"scale_search": "percentile", "percentile": True}, "percentile must be a number"),
        ({"granularity": "group", "group_size": 2.0}, "group_size must be a positive integer"),
    ],
)
def test_fields_of_another_type_are_refused(fields, message):
    with pytest.raises(cq.SpecError, match=message):
        QuantSpec(**{"format": "int4", **fields})


def test_group_sizes_may_be_any_integers():
    spec = QuantSpec("int4", "group", np.int64(32))
    assert spec == QuantSpec.parse("int4:group32")
    assert type(spec.group_size) is int
