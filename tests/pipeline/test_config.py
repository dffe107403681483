"""Settings of `prepare`: presets, files and options together."""

from pathlib import Path

from pipeline.config import PRESETS, load_config


def test_a_table_of_the_file_changes_only_what_it_names(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("[autoencoder]\nlatent = 64")
    config = load_config(file, preset="demo")
    assert config.autoencoder.latent == 64
    assert config.autoencoder.max_steps == PRESETS["demo"]["autoencoder"]["max_steps"]


def test_a_preset_is_not_changed_by_its_use(tmp_path: Path) -> None:
    before = {name: dict(values) for name, values in PRESETS.items()}
    load_config(preset="demo", overrides={"classes": 3, "autoencoder": {"width": 4}})
    assert before == PRESETS
