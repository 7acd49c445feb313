//! Writes the seeds of a fuzz target: `fuzz-seeds TARGET FOLDER`; without arguments, lists the targets.

#![allow(clippy::print_stdout, reason = "a list of names is its answer")]

use std::{env, fs, path::Path};

fn main() {
    let args: Vec<String> = env::args().skip(1).collect();
    let targets = aquifer_tests::fuzz::TARGETS;
    let [name, folder] = args.as_slice() else {
        return targets.iter().for_each(|target| println!("{}", target.name));
    };
    let target = targets.iter().find(|target| target.name == name.as_str()).expect("a target");
    fs::create_dir_all(folder).expect("a folder");
    (target.seeds)(Path::new(folder));
}
