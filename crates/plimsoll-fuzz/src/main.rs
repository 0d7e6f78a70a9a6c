//! Targets without libFuzzer: examples with a few changes each, for as long as is asked for. It knows nothing of coverage, and needs nothing but
//! a compiler.
//!
//! ```text
//! plimsoll-fuzz list                          the targets' names, one a line
//! plimsoll-fuzz seeds NAME DIRECTORY          its examples, each a file
//! plimsoll-fuzz run NAME SECONDS [SEED]       inputs, until something does not hold: that input is then in NAME.failed
//! plimsoll-fuzz once NAME FILE                one input
//! ```
use plimsoll_fuzz::mutate::changed;
use plimsoll_fuzz::{TARGETS, Target, target};
use plimsoll_guest::random::Rng;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match obey(&words) {
        Ok(code) => code,
        Err(why) => {
            eprintln!("plimsoll-fuzz: {why}");
            ExitCode::from(2)
        }
    }
}

fn obey(words: &[&str]) -> Result<ExitCode, String> {
    let known = |name: &str| target(name).ok_or_else(|| format!("there is no target {name:?}: see `list`"));
    let number = |text: &str| text.parse::<u64>().map_err(|error| format!("{text:?}: {error}"));
    match *words {
        ["list"] => {
            TARGETS.iter().for_each(|target| println!("{}", target.name));
            Ok(ExitCode::SUCCESS)
        }
        ["seeds", name, folder] => {
            let failed = |error: std::io::Error| format!("{folder}: {error}");
            fs::create_dir_all(folder).map_err(failed)?;
            for (number, example) in (known(name)?.examples)().iter().enumerate() {
                fs::write(Path::new(folder).join(format!("example-{number}")), example).map_err(failed)?;
            }
            Ok(ExitCode::SUCCESS)
        }
        ["run", name, seconds] => run(known(name)?, Duration::from_secs(number(seconds)?), 1),
        ["run", name, seconds, seed] => {
            run(known(name)?, Duration::from_secs(number(seconds)?), number(seed)?)
        }
        ["once", name, file] => {
            let bytes = fs::read(file).map_err(|error| format!("{file}: {error}"))?;
            println!("{}", if (known(name)?.body)(&bytes) { "accepted" } else { "refused" });
            Ok(ExitCode::SUCCESS)
        }
        _ => Err("say list, seeds NAME DIRECTORY, run NAME SECONDS [SEED], or once NAME FILE".to_owned()),
    }
}

fn run(target: &Target, lasting: Duration, seed: u64) -> Result<ExitCode, String> {
    let (examples, begun) = ((target.examples)(), Instant::now());
    let (mut random, mut runs, mut accepted) = (Rng::new(seed), 0_u64, 0_u64);
    while begun.elapsed() < lasting {
        let bytes = changed(&examples, &mut random);
        let Ok(is_accepted) = catch_unwind(AssertUnwindSafe(|| (target.body)(&bytes))) else {
            let path = format!("{}.failed", target.name);
            fs::write(&path, &bytes).map_err(|error| format!("{path}: {error}"))?;
            println!("{}: seed {seed}: input {runs} is in {path}", target.name);
            return Ok(ExitCode::FAILURE);
        };
        runs += 1;
        accepted += u64::from(is_accepted);
    }
    println!("{}: seed {seed}: {runs} inputs, {accepted} of them accepted, nothing found", target.name);
    Ok(ExitCode::SUCCESS)
}
