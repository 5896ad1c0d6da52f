"""Config, checkpoint and runtime faults, each with the tests that pin what it gets; the names are checked to exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# What goes wrong -> file and tests. Rows of bad data have tests/data/test_faults.py to themselves.
ROWS: dict[str, list[str]] = {
    "config: misspelt key, duplicate key, a quoted number": [
        "config/test_resolve.py: a_misspelt_key_names_the_nearest, a_key_written_twice_is_refused, "
        "a_quoted_number_is_refused_with_its_line",
    ],
    "config: n = 1 with group advantages, a batch that does not divide": [
        "config/test_checks.py: a_combination_that_cannot_work_is_refused_with_its_cure",
    ],
    "config: stages crossed, no critic, other vocabularies": [
        "config/test_checks.py: crossed_roles_are_refused, student_and_critic_must_mean_the_same_by_every_id",
    ],
    "config: the folder holds another run": [
        "launch/test_parent.py: a_folder_with_a_run_is_refused_and_left_as_it_was, force_moves_the_old_run_aside",
    ],
    "checkpoint: the newest is partial": [
        "checkpoint/test_saving.py: a_damaged_newest_is_told_and_the_one_before_is_used, "
        "an_unfinished_save_is_told_and_removed_by_the_next",
    ],
    "checkpoint: a flipped byte, a cut shard": ["checkpoint/test_saving.py: verify_names_the_damaged_file"],
    "checkpoint: a part missing, actor and critic of different steps": [
        "checkpoint/test_saving.py: a_missing_model_or_part_is_named, a_critic_of_another_step_is_found",
    ],
    "checkpoint: a pickle in any file": [
        "checkpoint/test_hostile.py: a_pickle_in_place_of_any_file_is_not_executed, "
        "a_payload_inside_a_torch_file_is_refused_by_name, the_payload_would_work_if_it_were_unpickled",
    ],
    "checkpoint: paths out of the folder, links": [
        "checkpoint/test_hostile.py: a_manifest_that_names_files_elsewhere_is_refused, "
        "metadata_that_names_files_elsewhere_is_refused, links_are_refused",
        "merge/test_resolve_model.py: an_index_that_names_files_elsewhere_is_refused, a_link_that_leads_out_is_refused",
    ],
    "checkpoint: resumed with other data or settings": [
        "launch/test_parent.py: resuming_with_other_settings_is_4_and_shows_them, resuming_with_changed_data_is_4",
    ],
    "merge: the target exists, the disk is too small": [
        "merge/test_ours.py: an_existing_target_is_left_as_it_is, too_little_disk_is_said_first, "
        "a_merge_that_is_killed_leaves_no_target",
    ],
    "runtime: the disk fills while saving": [
        "checkpoint/test_saving.py: too_little_disk_is_said_before_writing, "
        "a_disk_that_fills_while_writing_leaves_the_last_one_intact, "
        "a_disk_that_fills_under_the_generators_is_a_full_disk_too",
        "checkpoint/test_whole_runs.py: a_broken_run_resumes_to_what_an_undisturbed_one_is",
        "distributed/test_worker_end.py: a_full_disk_that_a_library_only_has_words_for_is_6",
    ],
    "runtime: NaN in loss, gradient or weights": [
        "model/test_actor_critic.py: a_loss_that_is_not_finite_names_its_rows_and_moves_no_weight, "
        "a_gradient_that_overflows_is_refused_though_its_loss_is_finite, "
        "weights_that_are_not_finite_stop_both_updates",
    ],
    "runtime: a group without spread, an empty answer": [
        "model/test_actor_critic.py: groups_without_spread_teach_nothing_and_are_counted, "
        "a_rollout_of_empty_answers_only_is_finite",
    ],
    "runtime: collapse": [
        "train/test_stops.py: a_collapse_with_on_bad_stop_saves_and_ends_with_5, "
        "the_same_alarm_with_on_bad_warn_is_told_and_the_run_goes_on",
        "metrics/test_health.py: each_symptom_is_named_first_with_its_cure",
    ],
    "runtime: out of memory": [
        "distributed/test_worker_end.py: want_of_memory_ends_with_6_and_names_the_knob",
        "launch/test_outcome.py: sigkill_is_7_and_6_when_the_kernel_killed_for_memory_meanwhile",
    ],
    "runtime: a rank killed, frozen or hanging": [
        "launch/test_supervisor.py: a_killed_rank_ends_the_run_with_7_within_10_s, "
        "a_stopped_rank_ends_the_run_within_the_limit_and_5_s, a_hanging_run_is_ended_and_its_stacks_are_in_the_log",
        "distributed/test_lost_peer.py: a_rank_whose_peer_was_killed_ends_with_7",
        "distributed/test_watchdog.py: a_phase_without_progress_ends_with_7_its_name_and_the_stacks",
    ],
    "runtime: signals in every phase, a second Ctrl-C": [
        "train/test_stops.py: a_signal_in_any_phase_saves_after_the_step_and_the_rest_is_bit_equal, "
        "a_request_to_save_saves_that_step_and_goes_on",
        "launch/test_supervisor.py: a_second_ctrl_c_ends_workers_that_do_not_listen",
    ],
    "runtime: TensorBoard missing or dying": [
        "launch/test_tensorboard.py: one_that_dies_is_a_warning_told_once, a_missing_one_is_a_warning",
    ],
    "runtime: W&B offline, or its key refused": [
        "metrics/test_sinks.py: wandb_without_a_server_is_a_warning_and_goes_on_offline, "
        "wandb_offline_writes_beside_the_run_and_never_the_key, "
        "a_wrong_wandb_key_fails_at_the_start_and_is_never_shown",
    ],
    "runtime: the folder cannot be written": ["launch/test_parent.py: a_folder_that_cannot_be_written_is_2"],
    "monitor: torn, rotated, empty or missing logs, 20 columns, resize": [
        "dashboard/test_monitor_cli.py: missing_empty_and_torn_logs_get_a_picture_and_exit_0, "
        "twenty_columns_are_enough_for_monitor, after_a_resize_the_screen_is_what_a_fresh_picture_of_that_size_shows",
        "metrics/test_record.py: a_rotated_file_goes_on_and_a_copied_one_is_read_again",
    ],
    "promise: kill -9 loses no commit; nothing outlives its parent; the terminal comes back": [
        "checkpoint/test_kill.py: killing_a_saver_loses_nothing_that_was_committed",
        "launch/test_supervisor.py: nothing_lives_after_the_parent_itself_was_killed, "
        "a_frozen_worker_dies_with_a_killed_parent_too",
        "launch/test_tensorboard.py: one_that_dies_with_a_killed_parent",
        "launch/test_terminal.py: the_terminal_is_given_back_after_a_signal",
    ],
    "promise: resume is exact, at another world size too": [
        "train/test_worlds_and_resume.py: a_killed_run_resumes_bit_equal_in_metrics_weights_and_moments",
        "checkpoint/test_world_sizes.py: weights_and_adam_moments_move_between_world_sizes",
    ],
    "promise: sockets on loopback, secrets nowhere": [
        "launch/test_sockets.py: two_ranks_of_one_machine_listen_on_loopback_only",
        "train/test_stops.py: a_secret_of_the_environment_is_in_no_file_of_a_run",
    ],
    "promise: several machines": [
        "launch/test_nodes.py: two_launchers_form_one_world_and_a_killed_rank_ends_both_with_7",
        "launch/test_namespaces.py: two_launchers_in_two_network_namespaces_train_one_world",
    ],
}


def missing(places: list[str]) -> list[str]:
    """Tests that are named but not there."""
    absent = []
    for place in places:
        file, _, names = place.partition(": ")
        text = (HERE / file).read_text() if (HERE / file).is_file() else ""
        absent += [f"{file}: {n}" for n in names.split(", ") if not re.search(rf"^def test_{n}\(", text, re.MULTILINE)]
    return absent


@pytest.mark.parametrize("fault", ROWS)
def test_a_fault_has_the_tests_it_names(fault: str) -> None:
    assert missing(ROWS[fault]) == []


def test_a_test_that_is_not_there_would_be_noticed() -> None:
    assert missing(["test_fault_rows.py: a_fault_has_the_tests_it_names, nobody_wrote_this"]) == [
        "test_fault_rows.py: nobody_wrote_this"
    ]
