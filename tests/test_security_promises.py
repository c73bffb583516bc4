"""Every sentence of SECURITY.md's promises has its tests, and every test that is named here exists."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]

# The first words of each sentence, and the tests that hold it.
HELD: dict[str, list[str]] = {
    "A config or an override that holds a secret is refused": [
        "test_security_secrets::test_a_config_with_a_secret_is_refused_and_not_repeated",
        "test_security_secrets::test_no_command_repeats_a_secret",
    ],
    "A secret is the value of an environment variable": [
        "test_security_secrets::test_a_config_with_a_secret_is_refused_and_not_repeated",
    ],
    "Secrets of the environment and of files": [
        "test_security_secrets::test_no_secret_is_in_any_file_of_a_run_or_of_wandb",
        "test_security_secrets::test_no_secret_is_said",
        "test_security_secrets::test_the_search_finds_what_is_there",
    ],
    "Nothing that a config names is executed": ["test_security_process::test_nothing_that_a_config_names_is_executed"],
    "Nothing in a run directory, a checkpoint or a token cache is executed": [
        "test_security_files::test_a_run_of_somebody_else_executes_nothing",
        "test_security_files::test_a_cache_of_somebody_else_executes_nothing",
        "test_security_files::test_there_are_enough_and_they_would_work",
    ],
    "moe-lab's own source has no": [
        "test_security_process::test_the_source_turns_no_data_into_code",
        "test_security_process::test_the_source_is_searched_for",
    ],
    "A run directory that no run wrote ends in one line": [
        "test_security_files::test_a_run_of_somebody_else_executes_nothing",
        "test_security_secrets::test_hiding_takes_no_longer_than_reading",
    ],
    "A token cache that moe-lab did not write": ["test_security_files::test_a_cache_of_somebody_else_executes_nothing"],
    "A run writes only into the folder": [
        "test_security_names::test_a_run_writes_only_into_the_folder_that_was_named",
        "test_security_names::test_the_watch_sees_a_write_outside",
    ],
    "A name that is joined to that folder": ["test_security_names::test_a_name_leads_nowhere"],
    "Nothing is written through a link": ["test_security_files::test_a_run_of_somebody_else_executes_nothing"],
    "Files and folders have the permissions": ["test_security_process::test_permissions_are_those_of_the_umask"],
    "Control characters are refused in configs": [
        "test_security_names::test_a_name_leads_nowhere",
        "test_security_names::test_what_is_shown_of_the_presets_of_others",
        "test_security_names::test_what_hydra_shows",
        "test_security_names::test_a_file_with_a_name_that_steers_a_terminal",
        "test_security_names::test_a_run_directory_whose_records_steer_a_terminal",
    ],
    "Markup in a name is shown as text": ["test_security_names::test_a_real_terminal_shows_such_names_as_text"],
    "A cell of an exported CSV is no formula": ["test_run_commands::test_a_cell_is_no_formula"],
    "Without a configured W&B key": ["test_security_process::test_a_default_run_connects_to_nobody"],
    "`moe-lab sync` sends of a run directory": [
        "test_sync::test_only_a_whole_record_of_this_run_is_uploaded",
        "test_sync::test_what_no_run_writes_is_refused",
        "test_sync::test_secrets_in_an_edited_run_are_not_sent",
        "test_sync::test_settings_in_a_run_send_the_key_nowhere",
        "test_sync::test_a_hostile_run_is_read_as_data",
    ],
}


def promises() -> list[str]:
    text = (ROOT / "SECURITY.md").read_text()
    section = text.split("## What is promised\n")[1].split("\n## ")[0]
    items = [" ".join(item.split()) for item in re.findall(r"^- ((?:.|\n(?!\n|- ))+)", section, re.MULTILINE)]
    return [sentence for item in items for sentence in re.split(r"(?<=\.) (?=[A-Z])", item)]


def test_every_promise_has_its_tests() -> None:
    found = promises()
    assert [start for sentence in found for start in HELD if sentence.startswith(start)] == list(HELD)
    assert len(found) == len(HELD) and all(HELD.values())


def test_the_named_tests_exist() -> None:
    for name in {name for names in HELD.values() for name in names}:
        file, function = name.split("::")
        tree = ast.parse((ROOT / f"tests/{file}.py").read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name
