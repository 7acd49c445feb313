//! Promise: no bytes, however hostile, make a parser panic, hang or allocate beyond their own size.
//!
//! Each target gets what libFuzzer found worth keeping, and mutations of that and of its seeds for a second or two, the
//! same ones on every run. The work is done in
//! a child process whose address space is bounded, so that a large allocation is a failure and
//! not just a slow machine. The long fuzzing is libFuzzer's (`fuzz/`), with the same targets.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use aquifer_tests::{
    fuzz::{TARGETS, Target},
    ledger::Ledger,
    oracle::cases,
    rng::Rng,
};

/// Address space of the child: its threads and libraries take about a quarter.
const ADDRESS_SPACE: &str = "1073741824";
/// Longest that one input may take; the slowest takes milliseconds where nothing else runs.
const INPUT_TIME_MAX: Duration = Duration::from_secs(5);
/// Which target the child runs, and where it finds its inputs; set only for the child.
const TARGET: &str = "AQUIFER_FUZZ_TARGET";
const INPUTS: &str = "AQUIFER_FUZZ_INPUTS";

fn target(name: &str) -> Target {
    TARGETS.into_iter().find(|target| target.name == name).unwrap_or_else(|| panic!("no target is called {name}"))
}

/// Runs [`child`] with the seeds of a target and what libFuzzer kept, bounded.
fn run_bounded(name: &str) {
    let folder = tempfile::tempdir().expect("temporary folder");
    (target(name).seeds)(folder.path());
    let kept = fuzz_folder().join("corpora").join(name).with_extension("tar.gz");
    if kept.exists() {
        let done = Command::new("tar").arg("-xzf").arg(&kept).arg("-C").arg(folder.path()).status();
        assert!(done.expect("tar runs").success(), "{}", kept.display());
    }
    let done = Command::new("prlimit")
        .arg(format!("--as={ADDRESS_SPACE}"))
        .arg(env::current_exe().expect("this test binary"))
        .args(["--exact", "--ignored", "--test-threads=1", "fuzz_smoke::child"])
        .env(TARGET, name)
        .env(INPUTS, folder.path())
        .output()
        .expect("prlimit runs");
    let said = [done.stdout, done.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(done.status.success() && said.contains("1 passed"), "{name}: {said}");
}

fn fuzz_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").join("fuzz")
}

/// Feeds a target all inputs and mutations of them; what makes it panic or dawdle is kept.
#[test]
#[ignore = "run by the other tests, in a bounded process"]
fn child() {
    let ledger = Ledger::begin("fuzzing");
    let target = target(&env::var(TARGET).expect("started by another test"));
    let folder = PathBuf::from(env::var_os(INPUTS).expect("started by another test"));
    let mut inputs: Vec<_> = fs::read_dir(&folder).expect("inputs").map(|e| e.expect("an input").path()).collect();
    inputs.sort();
    let inputs: Vec<Vec<u8>> = inputs.iter().map(|path| fs::read(path).expect("an input")).collect();
    inputs.iter().for_each(|input| judge(target, input));
    let mut rng = Rng::new(42);
    let mutations = cases(target.mutations);
    for _ in 0..mutations {
        let mut input = inputs[rng.below(inputs.len() as u64) as usize].clone();
        for _ in 0..=rng.below(6) {
            mutate(&mut input, &inputs, &mut rng);
        }
        judge(target, &input);
    }
    ledger.tell("42", &[("inputs", u64::from(mutations) + inputs.len() as u64)]);
}

fn judge(target: Target, input: &[u8]) {
    let started = Instant::now();
    let outcome = std::panic::catch_unwind(|| (target.run)(input));
    let took = started.elapsed();
    if outcome.is_err() || took > INPUT_TIME_MAX {
        let culprit = env::temp_dir().join(format!("aquifer-fuzz-{}", target.name));
        fs::write(&culprit, input).expect("write");
        panic!("{} took {took:?} or panicked over an input; it is in {}", target.name, culprit.display());
    }
}

/// One change of the kind that finds parsers' mistakes: fields near their limits, cuts, splices.
fn mutate(input: &mut Vec<u8>, seeds: &[Vec<u8>], rng: &mut Rng) {
    const WORDS: [u64; 14] = [
        0,
        1,
        0x7f,
        0xff,
        0x1ff,
        0x200,
        0xffff,
        0x1_0000,
        0xffff_ffff,
        1 << 62,
        1 << 63,
        (1 << 63) - 1,
        u64::MAX - 511,
        u64::MAX,
    ];
    if input.is_empty() {
        return;
    }
    // Headers matter most: half of the changes go to the first 256 bytes.
    let reach = if rng.once_in(2) { input.len().min(256) } else { input.len() };
    let at = usize::try_from(rng.below(reach as u64)).expect("an index");
    match rng.below(8) {
        0 => input[at] ^= 1 << rng.below(8),
        1 => input[at] = u8::try_from(rng.below(256)).expect("a byte"),
        2 | 3 => {
            let width = rng.pick(&[1, 2, 4, 8]);
            let at = at / width * width;
            let word = rng.pick(&WORDS).wrapping_add(rng.below(3)).wrapping_sub(1);
            let bytes = if rng.once_in(2) { word.to_be_bytes() } else { word.swap_bytes().to_be_bytes() };
            let bytes = if rng.once_in(2) { &bytes[8 - width..] } else { &bytes[..width] };
            let end = (at + width).min(input.len());
            input[at..end].copy_from_slice(&bytes[..end - at]);
        }
        4 => input.truncate(at.max(1)),
        5 => {
            // A field of another place, an offset most likely, lands here.
            let from = usize::try_from(rng.below(input.len() as u64)).expect("an index") / 8 * 8;
            let at = at / 8 * 8;
            let len = 8.min(input.len() - from.max(at));
            input.copy_within(from..from + len, at);
        }
        6 => {
            let other = &seeds[usize::try_from(rng.below(seeds.len() as u64)).expect("an index")];
            let end = (at + 512).min(other.len()).min(input.len());
            if at < end {
                input[at..end].copy_from_slice(&other[at..end]);
            }
        }
        _ => {
            let end = (at + 64).min(input.len());
            let byte = rng.pick(&[0, 0xff]);
            input[at..end].fill(byte);
        }
    }
}

macro_rules! survive {
    ($($test:ident: $target:literal,)*) => {
        $(#[test]
        fn $test() {
            run_bounded($target);
        })*

        /// Every target is run here, and under libFuzzer.
        #[test]
        fn no_target_is_left_out() {
            let mut here = vec![$($target),*];
            here.sort_unstable();
            assert_eq!(here, TARGETS.map(|target| target.name));
            let files = fs::read_dir(fuzz_folder().join("fuzz_targets")).expect("targets of libFuzzer");
            let mut there: Vec<_> = files.map(|file| file.expect("a target").path()).collect();
            there.sort();
            let name = |path: &PathBuf| path.file_stem().and_then(|stem| stem.to_str()).expect("a name").to_owned();
            assert_eq!(there.iter().map(name).collect::<Vec<_>>(), here);
        }
    };
}

survive! {
    native_layers: "aql",
    archives_of_disks: "archive",
    stored_blocks: "codec",
    orders_to_a_door: "control",
    hyper_v_disks: "hyperv",
    descriptions_of_machines: "machine",
    nbd_clients_of_hostile_servers: "nbd_client",
    nbd_servers_of_hostile_clients: "nbd_server",
    maps_and_journals: "overlay",
    partition_tables: "partitions",
    qcow2_images: "qcow2",
    replies_of_a_monitor: "qmp",
    records_of_a_repository: "record",
    records_of_a_session: "session",
    boot_traces: "trace",
    file_systems_with_unused_space: "unused",
    backup_files: "vbk",
    memories_of_guests: "vhost_user",
    files_of_stores: "store",
    streams_of_lzop: "lzop",
    vmware_disks: "vmdk",
}
