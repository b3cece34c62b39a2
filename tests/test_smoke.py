def test_kernels_folder_is_not_a_package():
    """A regular package named `kernels` in the working directory shadows the one that transformers imports."""
    from pathlib import Path

    assert not (Path(__file__).parents[1] / "kernels" / "__init__.py").exists()
