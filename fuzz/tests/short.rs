//! A short run of each target, and all committed inputs: part of every test run.

use oblak_fuzz::run::{Until, run};
use oblak_fuzz::targets::TARGETS;

/// The same inputs in every run; a long search with other seeds is `cargo xtask fuzz`.
const SEED: u64 = 1;

fn short(name: &str, inputs: u64) {
    let target = TARGETS.iter().find(|t| t.name == name).expect("a target");
    let done = run(target, SEED, Until::Count(inputs)).unwrap_or_else(|e| panic!("{e:#}"));
    assert!(done.inputs >= inputs);
    // A target that says the same of everything is fed with nonsense.
    assert!(done.outcomes > 1, "{name}: only one outcome of {} inputs", done.inputs);
    println!("{name}: {} inputs, {} outcomes", done.inputs, done.outcomes);
}

macro_rules! short {
    ($($name:ident $inputs:literal,)*) => {
        $(#[test]
        fn $name() {
            short(stringify!($name), $inputs);
        })*

        #[test]
        fn no_target_is_left_out() {
            let tried = [$(stringify!($name)),*];
            assert_eq!(TARGETS.iter().map(|t| t.name).collect::<Vec<_>>(), tried);
        }
    };
}

short! {
    certificate 3_000,
    cursor 20_000,
    dhcp_request 20_000,
    disk 2_000,
    dns_query 10_000,
    frames 20_000,
    join_token 20_000,
    layer 1_000,
    manifest 3_000,
    meta 10_000,
    objects 5_000,
    qmp 10_000,
    reference 20_000,
    registry 10_000,
    shim 20_000,
    sse 20_000,
    wire 5_000,
    words 20_000,
}
