"""What ``import corequant`` may load, and how long it may take."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_loads_no_framework_and_no_compiler():
    loaded = run(
        "import sys, corequant; "
        "print(sorted({m.partition('.')[0] for m in sys.modules} & {'torch', 'transformers', "
        "'numba', 'llvmlite', 'scipy', 'safetensors', 'rich', 'typer', 'corequant_torch', "
        "'corequant_transformers'}))"
    )
    assert loaded == "[]"


def test_a_numpy_call_imports_no_torch():
    loaded = run(
        "import sys, numpy as np, corequant as cq; cq.block_hadamard(np.ones(8)); "
        "print('torch' in sys.modules)"
    )
    assert loaded == "False"


def test_import_loads_only_what_names_need_at_once():
    loaded = run(
        "import sys, corequant; "
        "print(sorted(m for m in sys.modules if m.partition('.')[0] == 'corequant'))"
    )
    names = ["corequant", "corequant._cpu", "corequant._cpu.forks", "corequant.errors"]
    assert loaded == str([*names, "corequant.formats"])


@pytest.mark.torch
@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["quantize", "--help"],
        ["quantize", "m", "-o", "o", "--calibration", "t", "--weights", "int99"],
        ["evaluate", "m", "--text", "no such file"],
    ],
)
def test_help_and_wrong_arguments_of_the_command_load_no_framework(arguments):
    loaded = run(
        f"import sys; sys.argv[1:] = {arguments}; from corequant.cli import main\n"
        "try: main()\n"
        "except SystemExit as error: print(error.code)\n"
        "print(sorted({m.partition('.')[0] for m in sys.modules} & {'torch', 'transformers'}))"
    )
    status, frameworks = loaded.splitlines()[-2:]
    assert frameworks == "[]"
    assert status == ("0" if "--help" in arguments else "1")


@pytest.mark.torch
@pytest.mark.parametrize("path", ["tests/conformance/test_cuda.py", "bench/bench_gpu.py"])
def test_what_is_for_gpus_needs_torch_alone(path):
    """A machine with a GPU often has torch, and nothing else that we need."""
    absent = ["gguf", "platformdirs", "tomli_w", "transformers", "typer"]
    code = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({absent}))\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"runpy.run_path({str(ROOT / path)!r}); print('it runs')"
    )
    assert run(code) == "it runs"


@pytest.mark.torch
@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ("typer", "a package that the command needs is missing .*typer.*; install it with: "),
        (
            "transformers",
            "corequant_transformers needs transformers; install what is missing with: ",
        ),
        ("torch", "corequant_transformers needs torch; install what is missing with: "),
    ],
)
def test_the_command_says_what_it_needs(missing, expected):
    code = (
        f"import sys; sys.modules['{missing}'] = None; sys.argv[1:] = ['plan', 'm']; "
        "from corequant.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    wanted = rf'corequant: {expected}pip install "corequant\[transformers\]"\n'
    assert re.fullmatch(wanted, done.stderr)


@pytest.mark.parametrize(
    ("statement", "missing", "extra"),
    [
        ("import corequant_transformers", "torch", "transformers"),
        ("import corequant_transformers", "transformers", "transformers"),
        ("import corequant_transformers", "safetensors", "transformers"),
        ("from corequant_transformers import load", "ml_dtypes", "transformers"),
        ("from corequant_transformers.lm_eval import CorequantLM", "lm_eval", "lm-eval"),
        ("import corequant_torch", "torch", "torch"),
        ("import corequant_torch", "ml_dtypes", "torch"),
        ("import corequant.recipe as r; r.Recipe().to_toml()", "tomli_w", "transformers"),
    ],
)
def test_an_absent_extra_is_named_with_the_line_that_installs_it(statement, missing, extra):
    error = run(
        f"import sys; sys.modules['{missing}'] = None\n"
        f"try: {statement}\n"
        "except ImportError as error: print(type(error).__mro__, error)"
    )
    assert "BackendError" in error
    assert f" {missing}; " in error
    assert error.endswith(f'pip install "corequant[{extra}]"')


def test_importing_the_adapter_imports_no_framework():
    loaded = run(
        "import sys, corequant_transformers as cqhf; print('quantize' in dir(cqhf)); "
        "print(sorted({m.partition('.')[0] for m in sys.modules} & {'torch', 'transformers'}))"
    )
    assert loaded.splitlines() == ["True", "[]"]


def test_public_names_of_the_adapter_are_there():
    import corequant_transformers as cqhf

    assert list(cqhf.__all__) == sorted(cqhf.__all__)
    for name in cqhf.__all__:
        assert getattr(cqhf, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        cqhf.nothing  # noqa: B018


@pytest.mark.parametrize(
    "program",
    [
        "import corequant_transformers; from transformers.quantizers import auto",
        "from transformers.quantizers import auto; import corequant_transformers",
        "import corequant_transformers, importlib.util; "
        "importlib.util.find_spec('transformers.quantizers.auto'); "
        "from transformers.quantizers import auto",
        "import corequant_transformers, transformers; transformers.PreTrainedModel; "
        "from transformers.quantizers import auto",
    ],
)
def test_the_hook_is_installed_once_transformers_has_its_quantizers(program):
    installed = run(
        f"import sys; before = list(sys.meta_path); {program}\n"
        "for table in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):\n"
        "    print(table['compressed-tensors'].__module__)\n"
        "print([f for f in sys.meta_path if 'corequant' in type(f).__module__])"
    )
    hook = "corequant_transformers.exports.transformers_hook"
    assert installed.splitlines() == [hook, hook, "[]"]


def test_the_version_is_the_distributions():
    import importlib.metadata

    import corequant

    assert corequant.__version__ == importlib.metadata.version("corequant")


def test_import_takes_less_than_50_ms_beyond_numpy():
    # Processor time of the quickest of several: what else the machine is doing doesn't count.
    code = (
        "import time, numpy, numpy.random; t = time.process_time(); import corequant; "
        "print(time.process_time() - t)"
    )
    assert min(float(run(code)) for _ in range(5)) < 0.05


def test_public_names_are_sorted_and_there():
    import corequant

    assert list(corequant.__all__) == sorted(corequant.__all__)
    for name in corequant.__all__:
        assert name in ("formats", "presets") or getattr(corequant, name).__doc__
