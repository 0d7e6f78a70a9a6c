//! The tests: which there are, at which level, how they are run and what came of it.
//!
//! Enters: a choice. Leaves: a line for each test program with what it counted and how long it took, the log of each below
//! `target/xtask`, and as the last line `N passed, N failed, N skipped`. An error leaves too when a test failed, when
//! one was skipped that this machine could run, or when there was none to run.
//!
//! All chosen packages are built by one cargo call and their test programs are run from here, so that no package is built twice
//! with different features. Programs that mostly wait for emulated guests run beside those that need nothing but
//! processors, and of the host nothing that others change; then each of the others runs alone, so that no two compete for the machine's
//! memory, swap and time.
use crate::cargo::{self, Metadata, Package, TestProgram};
use crate::dist::trial;
use crate::machine;
use crate::no_std;
use crate::tally::Tally;
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::io::Write;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Tests that need nothing but a compiler.
const PURE: u8 = 0;
/// Tests that need a kernel's memory interfaces and KVM.
const KERNEL: u8 = 1;
/// Tests that need QEMU, libvirt and a stock Linux for guests.
const STOCK: u8 = 2;
/// Tests that need QEMU's models of processors, and assemblers for them.
const MODELS: u8 = 3;
/// Every member of the workspace is at one level.
const LEVELS: [(&str, u8); 21] = [
    ("xtask", PURE),
    ("plimsoll-types", PURE),
    ("plimsoll-inside", PURE),
    ("plimsoll-mmu", PURE),
    ("plimsoll-core", PURE),
    ("plimsoll-policy", PURE),
    ("plimsoll-sim", PURE),
    ("plimsoll-store", PURE),
    ("plimsoll-guest", PURE),
    ("plimsoll-sys", KERNEL),
    ("plimsoll-inspect", KERNEL),
    ("plimsoll-linux", KERNEL),
    ("plimsoll-vmm", KERNEL),
    ("plimsoll-attach", KERNEL),
    ("plimsoll-host", KERNEL),
    ("plimsoll", KERNEL),
    ("plimsoll-bench", KERNEL),
    ("plimsoll-fuzz", KERNEL),
    ("plimsoll-stock", STOCK),
    ("plimsoll-oracle", MODELS),
    ("plimsoll-metal", MODELS),
];
/// Test programs that mostly wait: for guests to boot and for managers to decide.
const WAITING: [&str; 2] = ["plimsoll tests/attached", "plimsoll-stock tests/stock"];
/// Packages and programs whose tests need the kernel's interfaces, and nothing that others change: neither swap nor KSM, and no clock.
const APART: [&str; 9] = [
    "plimsoll-inspect",
    "plimsoll-linux tests/disk",
    "plimsoll-linux tests/pager_model",
    "plimsoll-attach",
    "plimsoll-host tests/api",
    "plimsoll-host tests/keeper",
    "plimsoll tests/soak",
    "plimsoll-bench",
    "plimsoll-fuzz",
];
/// A test program that takes longer than this, apart from what it was asked for, hangs. The longest takes minutes, and several times as long where
/// this machine is busy with something else.
const PATIENCE: Duration = Duration::from_secs(30 * 60);
/// What a machine that comes and goes may take.
const CYCLE_PATIENCE: Duration = Duration::from_secs(2);
/// How often a running program is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// What to run.
pub(crate) struct Choice {
    /// One level, or all.
    pub(crate) level: Option<u8>,
    /// How long the soak lasts.
    pub(crate) soak: Duration,
    /// How many machines come and go.
    pub(crate) cycles: u32,
    /// Parts of test names; none means all tests.
    pub(crate) filters: Vec<String>,
}

/// A test program.
struct Suite {
    level: u8,
    name: String,
    program: PathBuf,
    folder: PathBuf,
}

impl Suite {
    fn is_apart(&self) -> bool {
        let package = self.name.split(' ').next().unwrap_or_default();
        APART.iter().any(|apart| [package, &self.name].contains(apart))
    }
}

/// Runs what was chosen.
pub(crate) fn run(choice: &Choice) -> Result<()> {
    let metadata = cargo::metadata(&cargo::root().join("Cargo.toml"))?;
    let logs = metadata.target_directory.join("xtask");
    fs::create_dir_all(&logs).with_context(|| format!("cannot make {}", logs.display()))?;
    let (here, lacking) = announce_machine();
    let runner = Runner { choice, logs, sum: Mutex::default(), here, lacking };

    let suites = build(&metadata, choice)?;
    if choice.level.is_none_or(|level| level == PURE) && choice.filters.is_empty() {
        runner
            .check(PURE, "rooms linked without std", |log| no_std::check(&metadata.target_directory, log))?;
    }
    if choice.level.is_none_or(|level| level == KERNEL) && choice.filters.is_empty() {
        // Its own tests have just had it built.
        let program = metadata.target_directory.join("debug/plimsoll");
        let logs = runner.logs.clone();
        runner
            .check(KERNEL, "package in an empty root", |log| trial::in_an_empty_root(&program, &logs, log))?;
    }
    let (waiting, working): (Vec<_>, Vec<_>) =
        suites.iter().partition(|suite| WAITING.contains(&suite.name.as_str()));
    let (beside, alone): (Vec<_>, Vec<_>) =
        working.into_iter().partition(|suite| [PURE, MODELS].contains(&suite.level) || suite.is_apart());
    thread::scope(|scope| {
        let waiting = scope.spawn(|| runner.suites(&waiting));
        let packaged = scope.spawn(|| runner.package_under_systemd(&metadata));
        let beside = runner.suites(&beside);
        let join = |thread: thread::ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|panic| resume_unwind(panic))
        };
        join(waiting).and(join(packaged)).and(beside)
    })?;
    runner.suites(&alone)?;
    let mut documented = cargo::cargo();
    documented.args(["test", "--doc", "--quiet", "--no-fail-fast", "--locked"]);
    documented.args(packages(&metadata, choice.level, Package::has_library)?).arg("--");
    documented.args(&choice.filters).arg("--show-output");
    runner.program(choice.level.unwrap_or(KERNEL), "examples in documentation", &mut documented)?;
    runner.conclude()
}

/// Says what this machine has and what it lacks. Returns the names of what it has, and the lowest level that lacks anything.
fn announce_machine() -> (String, Option<u8>) {
    let (here, missing): (Vec<_>, Vec<_>) =
        machine::capabilities().into_iter().partition(|capability| capability.is_here);
    let names = |list: &[machine::Capability]| list.iter().map(|one| one.name).collect::<Vec<_>>();
    let here = names(&here).join(",");
    println!("machine: has {here}");
    let lacking = missing.iter().map(|capability| capability.level).min();
    if let Some(level) = lacking {
        println!("machine: lacks {}; tests from level {level} on may be skipped", names(&missing).join(", "));
    }
    (here, lacking)
}

/// The arguments that choose the packages of a level. All of them together are the workspace, however many are asked.
fn packages(
    metadata: &Metadata,
    level: Option<u8>,
    wanted: impl Fn(&Package) -> bool,
) -> Result<Vec<String>> {
    let mut arguments = Vec::new();
    for package in metadata.members() {
        let own = level_of(&package.name)?;
        if level.is_none_or(|level| level == own) && wanted(package) {
            arguments.extend(["--package".to_owned(), package.name.clone()]);
        }
    }
    Ok(if level.is_none() { vec!["--workspace".to_owned()] } else { arguments })
}

fn level_of(package: &str) -> Result<u8> {
    let found = LEVELS.iter().find(|(name, _)| *name == package);
    found
        .map(|(_, level)| *level)
        .with_context(|| format!("{package} is at no level: add it to LEVELS in {}", file!()))
}

/// Builds the test programs, lowest level first.
fn build(metadata: &Metadata, choice: &Choice) -> Result<Vec<Suite>> {
    println!("building the tests");
    let start = Instant::now();
    let chosen = packages(metadata, choice.level, |_| true)?;
    let programs = cargo::test_programs(&chosen.iter().map(String::as_str).collect::<Vec<_>>())?;
    println!("built in {}", seconds(start.elapsed()));
    let mut suites = Vec::new();
    for TestProgram { package_id, target, program } in programs {
        let Some(package) = metadata.members().find(|package| package.id == package_id) else { continue };
        let part = if target.is("test") { format!("tests/{}", target.name) } else { "units".to_owned() };
        suites.push(Suite {
            level: level_of(&package.name)?,
            name: format!("{} {part}", package.name),
            program,
            folder: package.folder().to_owned(),
        });
    }
    let place =
        |suite: &Suite| LEVELS.iter().position(|(name, _)| suite.name.split(' ').next() == Some(*name));
    suites.sort_by_key(|suite| (suite.level, place(suite), suite.name.clone()));
    Ok(suites)
}

/// What came of all programs so far.
#[derive(Default)]
struct Sum {
    total: Tally,
    /// Skipped although this machine could run them.
    forbidden: Vec<String>,
}

/// Runs programs and adds up.
struct Runner<'a> {
    choice: &'a Choice,
    logs: PathBuf,
    sum: Mutex<Sum>,
    /// Capabilities this machine has, for tests to insist on.
    here: String,
    /// The lowest level whose tests need something it lacks.
    lacking: Option<u8>,
}

/// How a program ended.
enum End {
    Exited { success: bool },
    Hung,
}

impl Runner<'_> {
    /// Runs something that passes or fails as a whole.
    fn check(&self, level: u8, name: &str, check: impl FnOnce(&File) -> Result<()>) -> Result<()> {
        let (log, path) = self.log(name)?;
        let start = Instant::now();
        let outcome = check(&log);
        let tally = Tally::of_check(outcome.is_ok());
        self.end(level, name, tally, start, &path)?;
        if let Err(error) = outcome {
            println!("{error:#}");
        }
        Ok(())
    }

    /// Tries the package where systemd runs, if that is chosen and there is one to be had.
    fn package_under_systemd(&self, metadata: &Metadata) -> Result<()> {
        let is_chosen =
            self.choice.level.is_none_or(|level| level == KERNEL) && self.choice.filters.is_empty();
        if !is_chosen || !self.here.split(',').any(|name| name == "systemd") {
            return Ok(());
        }
        let program = metadata.target_directory.join("debug/plimsoll");
        self.check(KERNEL, "package under systemd", |log| trial::under_systemd(&program, &self.logs, log))
    }

    /// Runs test programs, one after the other.
    fn suites(&self, suites: &[&Suite]) -> Result<()> {
        suites.iter().try_for_each(|suite| {
            let mut command = Command::new(&suite.program);
            command.current_dir(&suite.folder).env("CARGO_MANIFEST_DIR", &suite.folder);
            command.args(&self.choice.filters).arg("--show-output");
            self.program(suite.level, &suite.name, &mut command)
        })
    }

    /// Runs a test program.
    fn program(&self, level: u8, name: &str, command: &mut Command) -> Result<()> {
        let (log, path) = self.log(name)?;
        let start = Instant::now();
        command.env("PLIMSOLL_REQUIRE", &self.here);
        command.env("PLIMSOLL_SOAK_SECONDS", self.choice.soak.as_secs().to_string());
        command.env("PLIMSOLL_CYCLES", self.choice.cycles.to_string());
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let asked = self.choice.soak + CYCLE_PATIENCE * self.choice.cycles;
        let end = wait(command, start + PATIENCE + asked)?;
        let output = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut tally = Tally::read(&String::from_utf8_lossy(&output)).unwrap_or_default();
        let broken = match end {
            End::Exited { success } => !success && tally.failed == 0,
            End::Hung => true,
        };
        if broken {
            tally += Tally::of_check(false);
        }
        self.end(level, name, tally, start, &path)
    }

    fn log(&self, name: &str) -> Result<(File, PathBuf)> {
        let path = self.logs.join(format!("{}.log", name.replace([' ', '/'], "-")));
        let log = File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok((log, path))
    }

    fn end(&self, level: u8, name: &str, tally: Tally, start: Instant, log: &Path) -> Result<()> {
        // Held to the end: what is said of one program stays together.
        let mut sum = self.sum.lock().unwrap_or_else(PoisonError::into_inner);
        let Tally { passed, failed, skipped, .. } = &tally;
        let took = seconds(start.elapsed());
        println!("level {level}  {name:<38} {passed:>4} passed {failed} failed {skipped} skipped  {took}");
        for reason in &tally.reasons {
            println!("    skipped: {reason}");
        }
        if tally.failed > 0 {
            println!("---- {name}: {}", log.display());
            std::io::stdout().write_all(&fs::read(log)?)?;
            println!("----");
        }
        if tally.skipped > 0 && self.lacking.is_none_or(|lacking| level < lacking) {
            sum.forbidden.push(name.to_owned());
        }
        sum.total += tally;
        Ok(())
    }

    /// The closing line, and whether the whole run is good.
    fn conclude(self) -> Result<()> {
        let Sum { total, forbidden } = self.sum.into_inner().unwrap_or_else(PoisonError::into_inner);
        let Tally { passed, failed, skipped, .. } = total;
        if !forbidden.is_empty() {
            println!("skipped although this machine can run them: {}", forbidden.join(", "));
        }
        println!("{passed} passed, {failed} failed, {skipped} skipped");
        if failed > 0 || !forbidden.is_empty() {
            bail!("the tests failed; the logs are in {}", self.logs.display());
        }
        if passed == 0 {
            bail!("no test ran; is there one whose name contains {:?}?", self.choice.filters);
        }
        Ok(())
    }
}

/// Waits for a program, which is killed when it is not done in time.
fn wait(command: &mut Command, deadline: Instant) -> Result<End> {
    let mut child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(End::Exited { success: status.success() });
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Ok(End::Hung);
        }
        thread::sleep(LOOK_EVERY);
    }
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}
