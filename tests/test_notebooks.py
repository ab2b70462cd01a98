"""The notebooks in `experiments/` run without a network, and what they keep is fit to be read."""

import ast
import re
from pathlib import Path

import nbclient
import nbformat
import pytest
from conftest import save_pictures

from aecore.models import NoiseReducer, ResolutionEnhancer
from aecore.networks.base import parameter_bytes

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
NOTEBOOKS = sorted(EXPERIMENTS.glob("*.ipynb"))


def read(name):
    return nbformat.read(EXPERIMENTS / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def keras_lines(notebook):
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    return re.findall(r"```python\n(.*?)```", "\n".join(texts), re.DOTALL)


def run(name, settings, folder):
    """Executes a notebook in a folder, with settings that come after its own.

    Returns:
      The number of pictures that it shows.
    """
    notebook = read(name)
    (own,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    own.source = "\n".join([own.source, *(f"{key} = {value!r}" for key, value in settings.items())])
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources=resources
    ).execute()
    return len(pictures(notebook))


def pictures(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return [output for output in outputs if "image/png" in output.get("data", {})]


def test_the_denoise_notebook_runs(tmp_path):
    settings = {"dataset": "sample", "data_dir": None, "epochs": 1, "run_dir": "run"}
    assert run("denoise_fashion_mnist", settings, tmp_path) == 3
    assert (tmp_path / "run" / "summary.json").exists()


def test_the_enhance_notebook_runs(tmp_path):
    save_pictures(tmp_path / "faces", 60, size=(100, 100), mode="RGB")
    settings = {
        "dataset": "folder",
        "data_dir": "faces",
        "recipe_steps": 2,
        "epochs": 1,
        "run_dir": "run",
    }
    assert run("enhance_faces", settings, tmp_path) == 3
    assert (tmp_path / "run" / "trial" / "summary.json").exists()
    assert (tmp_path / "run" / "small" / "summary.json").exists()


@pytest.mark.parametrize("name", [path.stem for path in NOTEBOOKS])
def test_a_notebook_keeps_the_outputs_of_one_run(name):
    notebook = read(name)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream", "execute_result"}
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    assert len(pictures(notebook)) == 3
    assert (EXPERIMENTS / f"{name}.ipynb").stat().st_size < 400_000


@pytest.mark.parametrize("name", [path.stem for path in NOTEBOOKS])
def test_what_a_notebook_keeps_tells_nothing_of_the_machine(name):
    for cell in code_cells(read(name)):
        texts = [o.get("text", o.get("data", {}).get("text/plain", "")) for o in cell.outputs]
        for text in texts:
            assert not re.search(r"(?<![\w.])[/~]\w|\b[A-Z]:\\", text), "an absolute path"
            assert not re.search(r"[\r\x1b]|%\|", text), "a progress bar"
        assert "execution" not in cell.metadata


@pytest.mark.parametrize(
    ("name", "model"),
    [("denoise_fashion_mnist", NoiseReducer()), ("enhance_faces", ResolutionEnhancer())],
)
def test_the_keras_lines_make_the_same_network(name, model):
    import keras

    lines = keras_lines(read(name))
    for each in lines:
        ast.parse(each)
    (network,) = (each for each in lines if "autoencoder = keras.Sequential" in each)
    names = {"keras": keras}
    exec(network, names)
    autoencoder = names["autoencoder"]
    assert isinstance(autoencoder, keras.Model)
    assert 4 * autoencoder.count_params() == parameter_bytes(model)
    assert autoencoder.output_shape == autoencoder.input_shape
