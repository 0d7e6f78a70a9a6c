//! Fuzzing: the targets of `crates/plimsoll-fuzz`, by the best means that this machine has.
//!
//! Enters: names of targets, and for how long. Leaves: what was found, below `target/fuzz`, and a line that says by which means it was looked for. What must
//! never happen: a run without coverage or sanitizer that looks like one with them.
//!
//! | means | needs |
//! |---|---|
//! | libFuzzer, coverage, address sanitizer | a nightly compiler, a C++ compiler |
//! | libFuzzer, coverage | a C++ compiler |
//! | examples with changes | nothing else |
use crate::cargo;
use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const PACKAGE: &str = "plimsoll-fuzz";
/// What cargo-fuzz has LLVM put in for libFuzzer; stable compilers know it, too.
const COVERAGE: [&str; 6] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "--cfg=fuzzing",
];

/// What to fuzz.
#[derive(clap::Args)]
pub(crate) struct Choice {
    /// Which targets; all if none is named.
    targets: Vec<String>,
    /// How long each.
    #[arg(long, default_value_t = 30)]
    seconds: u64,
    /// By which means, if not by the best there is.
    #[arg(long, value_enum)]
    by: Option<Means>,
}

/// By what inputs are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Means {
    /// libFuzzer with coverage and address sanitizer.
    Sanitizer,
    /// libFuzzer with coverage.
    Coverage,
    /// Examples with changes, without feedback.
    Changes,
}

impl Means {
    /// The best of this machine.
    fn best() -> Self {
        let works = |program: &str, words: &[&str]| {
            let mut command = Command::new(program);
            let status = command.args(words).stdout(Stdio::null()).stderr(Stdio::null()).status();
            status.is_ok_and(|status| status.success())
        };
        if !works("c++", &["--version"]) {
            Self::Changes
        } else if works("rustup", &["run", "nightly", "rustc", "--version"]) {
            Self::Sanitizer
        } else {
            Self::Coverage
        }
    }

    const fn told(self) -> &'static str {
        match self {
            Self::Sanitizer => "libFuzzer with coverage and address sanitizer, by the nightly compiler",
            Self::Coverage => "libFuzzer with coverage and without a sanitizer, by this compiler",
            Self::Changes => "examples with changes: neither coverage nor sanitizer",
        }
    }
}

/// Fuzzes each target in turn. An error says which found something.
pub(crate) fn run(choice: &Choice) -> Result<()> {
    let means = choice.by.unwrap_or_else(Means::best);
    println!("fuzz: by {}", means.told());
    let own = own(&["list"])?;
    let known: Vec<&str> = own.lines().collect();
    let targets = if choice.targets.is_empty() {
        known.clone()
    } else {
        choice.targets.iter().map(String::as_str).collect()
    };
    if let Some(unknown) = targets.iter().find(|target| !known.contains(target)) {
        bail!("there is no target {unknown:?}: the targets are {}", known.join(", "));
    }
    let folder = cargo::root().join("target/fuzz");
    let found: Result<Vec<bool>> =
        targets.iter().map(|target| one(target, means, choice.seconds, &folder)).collect();
    let found: Vec<&str> =
        targets.iter().zip(found?).filter_map(|(target, is_found)| is_found.then_some(*target)).collect();
    ensure!(found.is_empty(), "found something in {}: see {}", found.join(", "), folder.display());
    Ok(())
}

/// Whether something was found.
fn one(target: &str, means: Means, seconds: u64, folder: &Path) -> Result<bool> {
    let corpus = folder.join("corpus").join(target);
    let artifacts = folder.join("found").join(target);
    for path in [&corpus, &artifacts] {
        std::fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))?;
    }
    if means == Means::Changes {
        let mut command = package(&["run", target, &seconds.to_string()]);
        return Ok(!command.current_dir(&artifacts).status()?.success());
    }
    let seeds = corpus.display().to_string();
    own(&["seeds", target, &seeds])?;
    let program = libfuzzer(target, means, folder)?;
    let mut command = Command::new(program);
    command.arg(&corpus).arg(format!("-max_total_time={seconds}"));
    command.arg(format!("-artifact_prefix={}/", artifacts.display()));
    command.args(["-print_final_stats=1", "-timeout=20", "-max_len=65536", "-verbosity=0"]);
    let ended = command.stderr(Stdio::piped()).spawn()?.wait_with_output()?;
    let said = String::from_utf8_lossy(&ended.stderr);
    let count = |name| said.lines().find_map(|line| line.strip_prefix(name)).map_or("?", str::trim);
    let runs = count("stat::number_of_executed_units:");
    if ended.status.success() {
        println!("fuzz: {target}: {runs} inputs, nothing found");
        return Ok(false);
    }
    println!("fuzz: {target}: {runs} inputs, and one of them in {}:\n{said}", artifacts.display());
    Ok(true)
}

/// Builds a target for libFuzzer.
fn libfuzzer(target: &str, means: Means, folder: &Path) -> Result<PathBuf> {
    let mut command = match means {
        Means::Sanitizer => {
            let mut command = Command::new("rustup");
            command.args(["run", "nightly", "cargo"]);
            command
        }
        Means::Coverage | Means::Changes => Command::new("cargo"),
    };
    let mut flags = COVERAGE.join(" ");
    if means == Means::Sanitizer {
        flags += " -Zsanitizer=address";
    }
    let built = folder.join(if means == Means::Sanitizer { "sanitizer" } else { "coverage" });
    // Cargo and compiler that this command was started with are of another toolchain, perhaps.
    command.env_remove("RUSTC").env_remove("CARGO").env_remove("RUSTUP_TOOLCHAIN");
    command.env("RUSTFLAGS", flags).env("CARGO_TARGET_DIR", &built);
    // With a target, build scripts and macros are not instrumented.
    command.args(["build", "--release", "--target", cargo::TARGET, "--bin", target, "--manifest-path"]);
    command.arg(cargo::root().join("fuzz/Cargo.toml"));
    let status = command.status().context("cannot start cargo")?;
    ensure!(status.success(), "{target} cannot be built for libFuzzer: try --by changes");
    Ok(built.join(cargo::TARGET).join("release").join(target))
}

/// The package's own program.
fn package(words: &[&str]) -> Command {
    let mut command = cargo::cargo();
    command.args(["run", "--quiet", "--package", PACKAGE, "--manifest-path"]);
    command.arg(cargo::root().join("Cargo.toml")).arg("--").args(words);
    command
}

/// What it prints.
fn own(words: &[&str]) -> Result<String> {
    let output = package(words).stderr(Stdio::inherit()).output().context("cannot start cargo")?;
    ensure!(output.status.success(), "{PACKAGE} {} failed", words.join(" "));
    Ok(String::from_utf8(output.stdout)?)
}
