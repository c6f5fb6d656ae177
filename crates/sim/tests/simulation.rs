//! Whole clouds under virtual time, each in a process of its own as the program does it.

use std::path::Path;
use std::process::{Command, Output};

use oblak_sim::Mutation;

fn simulate(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_oblak-sim")).args(args).output().expect("the program of the simulator starts")
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn traced(dir: &Path, name: &str, seed: &str) -> Vec<u8> {
    let file = dir.join(name);
    let path = file.to_str().expect("temporary directories have plain names");
    let output = simulate(&["--seed", seed, "--hours", "0.05", "--pause", "4", "--trace", path]);
    assert!(output.status.success(), "{}", text(&output));
    std::fs::read(file).expect("the trace was written")
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    let dir = tempfile::tempdir().expect("there is room for a directory");
    let (first, again) = (traced(dir.path(), "first", "13"), traced(dir.path(), "again", "13"));
    assert!(first == again, "two simulations of one seed differ");
    assert!(String::from_utf8_lossy(&first).contains("chaos"), "nothing went wrong, so nothing was tried");
    assert!(first != traced(dir.path(), "other", "12"), "another seed is another simulation");
}

#[test]
fn nothing_is_violated() {
    let output = simulate(&["--seeds", "2", "--seed", "100", "--hours", "0.06", "--pause", "4"]);
    assert!(output.status.success(), "{}", text(&output));
}

/// With this defect a violation that names `what` is found among a few seeds.
fn finds(mutation: Mutation, what: &str) {
    let mut said = String::new();
    for seed in 1..=4 {
        let seed = seed.to_string();
        let output = simulate(&["--seed", &seed, "--hours", "0.2", "--pause", "3", "--mutation", mutation.as_str()]);
        said = text(&output);
        let failed = said.lines().find(|line| line.contains("FAILED"));
        if let Some(line) = failed {
            assert!(line.contains(what), "{} was found by another check: {line}", mutation.as_str());
            return;
        }
    }
    panic!("{} was not found: {said}", mutation.as_str());
}

#[test]
fn finds_reservations_without_a_guard() {
    finds(Mutation::NoAllocationGuard, "reserved is");
}

#[test]
fn finds_changes_that_undo_each_other() {
    // What is undone first is a matter of luck: a placement, a finalizer, somebody's change.
    finds(Mutation::NoInstanceGuard, "");
}

#[test]
fn finds_a_server_that_commits_although_it_does_not_lead() {
    finds(Mutation::NoLeaderGuard, "commits, but the leader is");
}

#[test]
fn finds_ports_that_do_not_know_their_node() {
    finds(Mutation::NoPortWrites, "its port");
}

#[test]
fn finds_addresses_that_are_kept() {
    finds(Mutation::KeepAddresses, "addresses");
}

#[test]
fn finds_guests_that_are_left_behind() {
    finds(Mutation::LeakGuests, "guest");
}

#[test]
fn finds_images_that_are_left_behind() {
    finds(Mutation::LeakImages, "image");
}

#[test]
fn finds_a_second_copy() {
    finds(Mutation::StartTwice, "runs on");
}

#[test]
fn finds_a_missing_margin_between_lease_and_restart() {
    finds(Mutation::NoFencingMargin, "runs on");
}

#[test]
fn finds_guests_that_outlive_their_lease() {
    finds(Mutation::NoFence, "runs on");
}
