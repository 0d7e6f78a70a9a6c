//! What is shipped: a Debian package and an archive of the same files.
//!
//! Enters: the workspace, or a program that was built already. Leaves: `plimsoll_VERSION_amd64.deb` and
//! `plimsoll-VERSION-x86_64-linux.tar.gz` below `target/dist`. What must never happen: a byte that depends on when, where or by whom it was made:
//! owners are root, names are sorted, and every file is of SOURCE_DATE_EPOCH, which is that of the last commit where nobody says otherwise.
//!
//! [`tree`]: the files. [`notices`]: whose code is in the program, and under which licences. [`trial`]: installed, upgraded, removed and purged, in a root that is thrown away.
//! [`booted`]: where systemd runs.
mod booted;
mod notices;
mod tree;
pub(crate) mod trial;

use crate::cargo::{self, TARGET};
use anyhow::{Context, Result, bail, ensure};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// What to ship.
#[derive(clap::Args)]
pub(crate) struct Choice {
    /// Ship this program instead of building one.
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
    /// Make both twice and compare them, then install, upgrade, remove and purge the package on a minimal Debian (root; mmdebstrap).
    #[arg(long)]
    check: bool,
}

/// How hard files are compressed.
#[derive(Clone, Copy)]
pub(crate) enum Effort {
    /// For users.
    Shipped,
    /// For a test that throws them away.
    Quick,
}

impl Effort {
    /// What dpkg-deb and gzip are told.
    fn flags(self) -> (&'static [&'static str], &'static str) {
        match self {
            Self::Shipped => (&["-Zxz", "-z6", "--threads-max=1"], "gzip -n9"),
            Self::Quick => (&["-Zgzip", "-z1"], "gzip -n1"),
        }
    }
}

/// What was made.
pub(crate) struct Made {
    pub(crate) package: PathBuf,
    pub(crate) archive: PathBuf,
}

impl Made {
    fn both(&self) -> [&Path; 2] {
        [&self.package, &self.archive]
    }
}

/// Makes what was chosen.
pub(crate) fn run(choice: &Choice) -> Result<()> {
    let target = cargo::metadata(&cargo::root().join("Cargo.toml"))?.target_directory.join("dist");
    let program = choice.program.clone().map_or_else(|| build(&target), Ok)?;
    let made = make(&program, &target, Effort::Shipped)?;
    for path in made.both() {
        println!("{}  {} bytes", path.display(), fs::metadata(path)?.len());
    }
    if choice.check {
        is_the_same_twice(&program, &made, &target.join("again"))?;
        println!("made twice: the same bytes");
        let log = target.join("trial.log");
        let log = File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
        trial::in_an_empty_root(&program, &target, &log)?;
        println!("an empty root: installed, upgraded, removed, purged; nothing is left");
        trial::on_debian(&made.package)?;
    }
    Ok(())
}

/// Builds the program for users: without debug information, and without the paths of whoever builds it.
fn build(target: &Path) -> Result<PathBuf> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    let mut flags = vec![format!("--remap-path-prefix={}=/plimsoll", cargo::root().display())];
    flags.extend(home.map(|home| format!("--remap-path-prefix={}=/cargo", home.display())));
    let mut command = cargo::cargo();
    command.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f")).env("CARGO_PROFILE_RELEASE_DEBUG", "0");
    command.args(["build", "--release", "--locked", "--package", "plimsoll", "--target", TARGET]);
    cargo::run(command.arg("--target-dir").arg(target))?;
    Ok(target.join(TARGET).join("release/plimsoll"))
}

/// Makes package and archive of a program in `folder`.
pub(crate) fn make(program: &Path, folder: &Path, effort: Effort) -> Result<Made> {
    let metadata = cargo::metadata(&cargo::root().join("Cargo.toml"))?;
    let package = metadata.members().find(|package| package.name == "plimsoll");
    let package = package.context("the workspace has no package plimsoll")?;
    let epoch = epoch()?;
    let staged = folder.join("staged");
    if staged.exists() {
        fs::remove_dir_all(&staged).with_context(|| format!("cannot remove {}", staged.display()))?;
    }
    let archive_name = format!("plimsoll-{}-x86_64-linux", package.version);
    let files = staged.join(&archive_name);
    tree::files(program, &files)?;
    tree::settle(&files, epoch)?;
    let made = Made {
        package: folder.join(format!("plimsoll_{}_amd64.deb", package.version)),
        archive: folder.join(format!("{archive_name}.tar.gz")),
    };
    let (deb_flags, gzip) = effort.flags();
    let mut tar = Command::new("tar");
    tar.args([
        "--create",
        "--sort=name",
        "--format=gnu",
        "--owner=0",
        "--group=0",
        "--numeric-owner",
        "--mode=u+w,go-w",
    ]);
    tar.arg(format!("--mtime=@{epoch}")).args(["--use-compress-program", gzip]);
    cargo::run(tar.arg("--directory").arg(&staged).arg("--file").arg(&made.archive).arg(&archive_name))?;

    tree::control(package, &files)?;
    tree::settle(&files, epoch)?;
    let mut deb = Command::new("dpkg-deb");
    deb.env("SOURCE_DATE_EPOCH", epoch.to_string()).args(["--root-owner-group"]).args(deb_flags);
    deb.stdout(std::process::Stdio::null());
    cargo::run(deb.arg("--build").arg(&files).arg(&made.package))?;
    fs::remove_dir_all(&staged).with_context(|| format!("cannot remove {}", staged.display()))?;
    Ok(made)
}

/// Makes both once more, elsewhere, a second later at least, and compares.
fn is_the_same_twice(program: &Path, made: &Made, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let again = make(program, folder, Effort::Shipped)?;
    same(made, &again)?;
    fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))
}

/// That two makings are the same to the byte.
pub(crate) fn same(one: &Made, other: &Made) -> Result<()> {
    for (one, other) in one.both().into_iter().zip(other.both()) {
        let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
        ensure!(read(one)? == read(other)?, "{} and {} differ", one.display(), other.display());
    }
    Ok(())
}

/// Seconds since 1970 that every file is of.
fn epoch() -> Result<u64> {
    if let Ok(text) = std::env::var("SOURCE_DATE_EPOCH") {
        return text
            .parse()
            .with_context(|| format!("SOURCE_DATE_EPOCH is {text:?}: give seconds since 1970"));
    }
    let mut git = Command::new("git");
    git.current_dir(cargo::root()).args(["log", "-1", "--format=%ct"]);
    let said = git.output().context("cannot start git: set SOURCE_DATE_EPOCH")?;
    let text = String::from_utf8_lossy(&said.stdout);
    match text.trim().parse() {
        Ok(epoch) if said.status.success() => Ok(epoch),
        _ => bail!("git knows no last commit here: set SOURCE_DATE_EPOCH to seconds since 1970"),
    }
}

fn time_of(epoch: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(epoch)
}
