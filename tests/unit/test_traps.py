# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The easiest mistakes with these formats, and the tests that would notice each; an entry whose tests are
gone fails.
"""

from __future__ import annotations

import pathlib
import re

import pytest

TESTS = pathlib.Path(__file__).resolve().parents[1]

TRAPS: dict[str, tuple[str, ...]] = {
    "01 an empty file has a zero root, and full tree levels add none": (
        "an_empty_file_has_a_zero_root_not_the_hash_of_a_zero_block",
        "exactly_full_levels_do_not_add_a_level",
    ),
    "02 objects are named by fs-verity digests": ("put_stores_bytes_under_their_fs_verity_digest",),
    "03 links leave out the common directories": (
        "link_texts_leave_out_the_common_directories",
        "register_writes_the_exact_link_and_tells_whether_it_changed",
    ),
    "04 a repository is secure if meta.json is sealed": ("secure_is_what_has_a_sealed_meta_json",),
    "05 the effective image format": (
        "effective_erofs_formats",
        "a_legacy_repository_is_upgraded_to_what_cfsctl_would_write",
    ),
    "06 the lock is shared for writers too, and not inherited": (
        "readers_and_writers_share_the_lock_and_only_a_collection_excludes",
        "all_descriptors_are_closed_on_exec_and_by_close",
    ),
    "07 the order of publishing": (
        "killed_at_any_step_leaves_a_repository_that_the_next_run_finishes",
        "no_instant_of_a_pull_loses_a_tagged_image_to_a_collector",
    ),
    "08 two header layouts of splitstreams": ("the_old_header_layout_is_read",),
    "09 sections in the file, and zstd frames without a content size": (
        "names_come_before_chunks_in_the_file",
        "an_empty_stream_has_no_chunks_but_two_empty_frames",
        "the_compressor_writes_the_frame_of_the_format",
    ),
    "10 adjacent inline data is one chunk": (
        "adjacent_inline_data_becomes_one_chunk",
        "a_very_long_inline_run_is_one_chunk_and_leaves_memory",
    ),
    "11 the split rule": (
        "contents_of_regular_files_over_64_bytes_are_external",
        "contents_of_other_types_are_inline",
        "padding_is_inline_and_kept_as_it_is",
        "everything_after_the_end_marker_is_kept_inline",
    ),
    "12 documents are one external object": ("documents_are_stored_byte_for_byte_as_one_external_object",),
    "13 the named refs of manifests, and blobs of artifacts": (
        "documents_are_stored_byte_for_byte_as_one_external_object",
        "several_artifacts_share_the_empty_configuration",
    ),
    "14 configuration and manifest follow the image": (
        "an_image_pulled_without_erofs_gains_it_on_the_next_run",
        "no_instant_of_a_pull_loses_a_tagged_image_to_a_collector",
    ),
    "15 keys of image formats": ("keys_of_images", "every_format_of_the_repository_is_made"),
    "16 how tags are written": (
        "tags_are_encoded_percent_first",
        "tags_are_decoded_in_one_pass_and_upper_case_only",
        "names_that_cannot_be_given_are_refused",
    ),
    "17 dangling refs, and refs that collectors follow by object": (
        "listing_tolerates_dangling_refs_strange_targets_and_other_files",
        "the_collector_of_this_test_finds_the_window_that_it_is_about",
    ),
    "18 whiteouts, missing parents, hardlinks, metadata of directories": (
        "missing_parents_are_made_alike_for_every_kind_of_entry",
        "an_opaque_marker_removes_what_is_there_at_that_moment_even_of_its_own_layer",
        "a_hardlink_shares_the_inode_whatever_its_header_says",
        "a_directory_over_a_directory_replaces_all_metadata_and_keeps_children",
    ),
    "19 the transform of every tree": (
        "the_root_takes_the_metadata_of_usr_and_nothing_of_its_own_entry",
        "run_is_emptied_and_takes_the_time_of_usr_only",
        "extended_attributes_are_filtered",
    ),
    "20 seconds from the last PAX time, nanoseconds from the first": (
        "pax_times",
        "bootable_images_equal_those_of_cfsctl",
    ),
    "21 stubs, order of names and smallest time of an image": (
        "trap_dot_and_dotdot_are_sorted_among_the_other_names",
        "trap_stubs_count_as_inodes",
        "trap_negative_times_compare_unsigned",
    ),
    "22 the table of shared xattrs": (
        "trap_ties_of_shared_xattrs_are_broken_otherwise_in_each_epoch",
        "trap_references_count_from_the_block_that_the_table_begins_in",
    ),
    "23 padding of inodes": (
        "golden_trees_have_the_digests_of_cfsctl",
        "random_directories_have_the_image_that_cfsctl_makes",
    ),
    "24 images are mounted by their measured id": (
        "a_damaged_image_is_not_mounted",
        "an_object_that_is_no_listed_image_is_not_mounted",
    ),
    "25 pipes have no end before FinishPipe": (
        "a_document_larger_than_the_pipe_does_not_deadlock",
        "a_blob_that_breaks_off_is_explained_by_finish_pipe",
        "a_silent_transfer_is_given_up_after_the_timeout",
    ),
    "26 a stored layer proves nothing": (
        "mistake_26_a_poisoned_layer_is_reported_and_replaced",
        "mistake_26_a_layer_of_another_tool_is_hashed_once_and_then_trusted",
        "mistake_26_a_raw_blob_never_stands_where_a_diff_id_can",
    ),
    "27 zstd:chunked without padding": ("mistake_27_zstd_chunked_without_padding_is_restored",),
    "28 the manifest's object id tells no change": ("cfsctl_pulls_our_image_again_without_new_streams",),
}

NAMES = {
    name
    for path in TESTS.rglob("test_*.py")
    for name in re.findall(r"^def test_(\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
}


@pytest.mark.parametrize("trap", TRAPS)
def test_every_trap_has_its_tests(trap: str) -> None:
    assert [name for name in TRAPS[trap] if name not in NAMES] == []
