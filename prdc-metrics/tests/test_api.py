"""What `import prdc_metrics` promises."""

import ast
import subprocess
import sys
from pathlib import Path

import prdc_metrics


def test_every_public_name_is_what_it_says():
    for name in prdc_metrics.__all__:
        value = getattr(prdc_metrics, name)
        assert callable(value) and value.__name__ == name and value.__doc__
    assert set(prdc_metrics.__all__) <= set(dir(prdc_metrics))


def test_importing_the_metrics_is_light_and_keeps_their_names():
    """No heavy package; and a function is not hidden by a module of its name, whatever was imported first."""
    code = "import sys, prdc_metrics.single_samples, prdc_metrics.metrics\n"
    code += "from prdc_metrics import prdc, realism, compute_family, expected_coverage, RealManifold\n"
    code += "import prdc_metrics.scoring\n"
    code += "assert all(map(callable, (prdc, realism, compute_family)))\n"
    code += (
        "heavy = {'lightning', 'pandas', 'matplotlib', 'torchmetrics', 'torchvision', 'timm'} & sys.modules.keys()\n"
    )
    code += "sys.exit(' '.join(heavy) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_type_checkers_see_every_public_name_and_no_other():
    """A misspelt import must fail in mypy: what it reads are the imports under TYPE_CHECKING alone."""
    tree = ast.parse(Path(prdc_metrics.__file__).read_text())
    (switch,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {name.name for node in switch.body for name in node.names}
    assert ast.unparse(switch.test) == "TYPE_CHECKING" and seen == set(prdc_metrics.__all__)
    assert not [node for node in tree.body if isinstance(node, ast.FunctionDef)]  # no __getattr__ that takes any name
