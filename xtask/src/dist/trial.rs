//! A package's life on a machine: installed, installed again over changed settings, removed, purged.
//!
//! Enters: a package. Leaves: an error that says what did not hold. What must never happen: anything outside of the root that was made for
//! the trial changed; so dpkg has a database of its own, scripts are told that they are not at home, and a Debian is entered in a
//! mount namespace that ends with the command.
//!
//! There are three roots. [`under_systemd`] is this machine's files under a layer of memory, where a systemd of its own does what the package asks
//! it for. [`in_an_empty_root`] takes seconds and is part of the tests: dpkg unpacks into an empty folder whose
//! database says that the dependencies are there. [`on_debian`] makes a minimal Debian from its registry, a minute or two and 100 MB, and so is
//! asked for: `cargo xtask dist --check`.
use super::booted::Booted;
use super::{Effort, make, same, tree};
use crate::cargo::{self, run};
use crate::setup::{is_root, is_there};
use anyhow::{Context, Result, bail, ensure};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// A setting that an administrator changes.
const SETTING: &str = "etc/plimsoll/plimsoll.toml";
const CHANGED: &str = "# changed\n";
/// What must be there.
const WANTED: [&str; 9] = [
    "usr/bin/plimsoll",
    "usr/lib/systemd/system/plimsoll.service",
    "etc/plimsoll/daemon.env",
    "usr/share/man/man1/plimsoll-daemon.1.gz",
    "usr/share/bash-completion/completions/plimsoll",
    "usr/share/doc/plimsoll/copyright",
    "usr/share/doc/plimsoll/THIRD-PARTY.gz",
    "usr/share/doc/plimsoll/examples/grafana/plimsoll.json",
    "usr/share/doc/plimsoll/examples/prometheus/plimsoll.rules.yml",
];

/// Stands in for systemctl: writes down what it is asked, and says that the service has ended.
const SYSTEMCTL: &str = "#!/bin/sh\necho \"$*\" >>/asked\ncase $1 in show) echo inactive ;; esac\n";

/// A folder that is removed at the end.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Makes packages of a program twice, which must be the same, and tries one in an empty root. What tools print goes to `log`.
pub(crate) fn in_an_empty_root(program: &Path, folder: &Path, log: &File) -> Result<()> {
    let scratch = Scratch(folder.join(format!("trial-{}", std::process::id())));
    let [one, other, root] = ["one", "other", "root"].map(|name| scratch.0.join(name));
    for folder in [&one, &other, &root.join("var/lib/dpkg/info"), &root.join("var/lib/dpkg/updates")] {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let made = make(program, &one, Effort::Quick)?;
    same(&made, &make(program, &other, Effort::Quick)?)?;
    let there = |package: &str| {
        format!(
            "Package: {package}\nStatus: install ok installed\nMaintainer: x\nArchitecture: amd64\nVersion: 99\nDescription: x\n\n"
        )
    };
    fs::write(root.join("var/lib/dpkg/status"), there("libc6") + &there("libgcc-s1"))?;
    let dpkg = |words: &[&str], package: &Path| {
        let mut command = Command::new("dpkg");
        command.arg(format!("--root={}", root.display()));
        // Not the administrator's of this machine: images of containers leave documentation out.
        command.args([
            "--path-include=/*",
            "--force-script-chrootless",
            "--force-not-root",
            "--force-unsafe-io",
            "--force-confold",
        ]);
        run(command.args(words).arg(package).stdout(log.try_clone()?).stderr(log.try_clone()?))
    };
    dpkg(&["--install"], &made.package)?;
    is_installed(&root)?;
    let said = Command::new(root.join("usr/bin/plimsoll")).arg("--version").output()?;
    ensure!(said.status.success() && said.stdout.starts_with(b"plimsoll "), "it does not say its version");
    fs::write(root.join(SETTING), CHANGED)?;
    dpkg(&["--install"], &made.package)?;
    ensure!(
        fs::read_to_string(root.join(SETTING))? == CHANGED,
        "a changed setting did not outlive an upgrade"
    );
    let name = Path::new("plimsoll");
    dpkg(&["--remove"], name)?;
    ensure!(root.join(SETTING).exists() && !root.join("usr/bin").exists(), "settings stay, and nothing else");
    dpkg(&["--purge"], name)?;
    let left = left_in(&root)?;
    ensure!(left.is_empty(), "left after a purge: {left:?}");
    Ok(())
}

fn is_installed(root: &Path) -> Result<()> {
    let missing: Vec<_> = WANTED.into_iter().filter(|path| !root.join(path).is_file()).collect();
    ensure!(missing.is_empty(), "not installed: {}", missing.join(", "));
    let wants = root.join("etc/systemd/system/multi-user.target.wants/plimsoll.service");
    ensure!(!wants.is_symlink(), "installing enabled the service");
    Ok(())
}

/// Everything in a root but dpkg's own.
fn left_in(root: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    tree::walk(root, &mut paths)?;
    let dpkg = root.join("var/lib/dpkg");
    paths.retain(|path| !path.starts_with(&dpkg) && !dpkg.starts_with(path));
    Ok(paths)
}

/// The service of an installed package.
const UNIT: &str = "plimsoll.service";
/// How long a daemon may take to go on as another program: a moment where nothing else runs.
const PATIENCE: Duration = Duration::from_secs(180);

/// Installs a package of a program where systemd runs, starts what it has installed, upgrades, removes and purges it. What tools print goes to
/// `log`.
pub(crate) fn under_systemd(program: &Path, folder: &Path, log: &File) -> Result<()> {
    let scratch = Scratch(folder.join(format!("trial-systemd-{}", std::process::id())));
    fs::create_dir_all(&scratch.0).with_context(|| format!("cannot make {}", scratch.0.display()))?;
    let made = make(program, &scratch.0, Effort::Quick)?;
    let place = |root: &Path, _: &Path| fs::copy(&made.package, root.join("plimsoll.deb")).map(drop);
    let booted = Booted::start(&scratch.0.join("booted"), place).context("no systemd of its own")?;
    let inside = |words: &[&str]| -> Result<()> {
        let (program, words) = words.split_first().context("no program")?;
        let mut command = booted.command(program);
        run(command.args(words).stdout(log.try_clone()?).stderr(log.try_clone()?))
            .with_context(|| booted.journal().unwrap_or_default())
    };
    let is = |name: &str, value: &str| -> Result<()> {
        let found = booted.property(UNIT, name)?;
        ensure!(found == value, "{name} is {found}, not {value}: {}", booted.journal()?);
        Ok(())
    };
    let install =
        ["dpkg", "--no-triggers", "--path-include=/*", "--force-confold", "--install", "/plimsoll.deb"];
    inside(&install)?;
    is("ActiveState", "inactive")?;
    inside(&["systemd-analyze", "verify", "--man=no", UNIT])?;
    inside(&["systemctl", "start", UNIT])?;
    is("ActiveState", "active")?;
    is("StatusText", "0 machines")?;
    inside(&["systemctl", "reload", UNIT])?;
    let keeper = booted.property(UNIT, "MainPID")?;
    let managers = booted.path(&format!("/proc/{keeper}/task/{keeper}/children"));
    let before = fs::read_to_string(&managers)?;
    inside(&install)?;
    let deadline = Instant::now() + PATIENCE;
    while fs::read_to_string(&managers).is_ok_and(|now| now.trim().is_empty() || now == before) {
        ensure!(Instant::now() < deadline, "the daemon did not hand over: {}", booted.journal()?);
        std::thread::sleep(Duration::from_millis(20));
    }
    is("MainPID", &keeper)?;
    is("ActiveState", "active")?;
    inside(&["dpkg", "--no-triggers", "--remove", "plimsoll"])?;
    is("ActiveState", "inactive")?;
    is("Result", "success")?;
    inside(&["dpkg", "--purge", "plimsoll"])?;
    let left = ["/etc/plimsoll", "/var/lib/plimsoll", "/run/plimsoll"].map(|path| booted.path(path));
    ensure!(left.iter().all(|path| !path.exists()), "something is left of {left:?}");
    Ok(())
}

/// Tries the package on a Debian 12 that is made for it.
pub(crate) fn on_debian(package: &Path) -> Result<()> {
    if !is_root() || !is_there("mmdebstrap") {
        bail!("--check makes a Debian: run it as root, with mmdebstrap installed");
    }
    let scratch = Scratch(std::env::temp_dir().join(format!("plimsoll-debian-{}", std::process::id())));
    let root = scratch.0.join("root");
    fs::create_dir_all(&scratch.0).with_context(|| format!("cannot make {}", scratch.0.display()))?;
    let mut make = Command::new("mmdebstrap");
    make.args(["--variant=minbase", "--include=systemd", "--mode=root", "--quiet", "bookworm"]);
    run(make.arg(&root).arg("http://deb.debian.org/debian"))?;
    let before = list(&root)?;
    fs::copy(package, root.join("plimsoll.deb")).context("the package cannot be copied")?;
    // As far as scripts can see, systemd runs.
    fs::create_dir_all(root.join("run/systemd/system"))?;
    let stand_in = root.join("usr/local/bin/systemctl");
    fs::write(&stand_in, SYSTEMCTL)?;
    cargo::run(Command::new("chmod").arg("755").arg(&stand_in))?;
    let inside = |words: &[&str]| {
        println!("debian: {}", words.join(" "));
        let mut command = Command::new("unshare");
        command.args(["--mount", "--pid", "--fork", "--kill-child"]);
        command.arg(format!("--mount-proc={}", root.join("proc").display()));
        run(command.arg("chroot").arg(&root).args(words).env("DEBIAN_FRONTEND", "noninteractive"))
    };
    inside(&["dpkg", "--install", "/plimsoll.deb"])?;
    is_installed(&root)?;
    inside(&["plimsoll", "--version"])?;
    // 1 says that this host lacks something, 0 that it does not: both have looked.
    inside(&["sh", "-c", "plimsoll host check; test $? -le 1"])?;
    inside(&["systemd-analyze", "verify", "--man=no", "plimsoll.service"])?;
    inside(&["dpkg", "--install", "/plimsoll.deb"])?;
    inside(&["dpkg", "--no-triggers", "--remove", "plimsoll"])?;
    inside(&["dpkg", "--purge", "plimsoll"])?;
    let asked = fs::read_to_string(root.join("asked")).context("systemctl was asked nothing")?;
    println!("debian: systemctl was asked: {}", asked.trim().replace('\n', "; "));
    ensure!(asked.contains("stop plimsoll.service"), "removing did not stop the service");
    ensure!(asked.contains("-s USR2 plimsoll.service"), "upgrading did not hand over to the new program");
    for word in ["enable", "start"] {
        let is_asked = asked.lines().any(|line| line.split_whitespace().next() == Some(word));
        ensure!(!is_asked, "the package asked systemd to {word} something");
    }
    for ours in ["plimsoll.deb", "asked", "usr/local/bin/systemctl"] {
        fs::remove_file(root.join(ours))?;
    }
    let left: Vec<_> = list(&root)?.into_iter().filter(|path| !before.contains(path)).collect();
    ensure!(left.is_empty(), "left after a purge: {left:?}");
    println!("debian: installed, upgraded, removed, purged; nothing is left");
    Ok(())
}

/// Every path of a root but those that dpkg and its tools keep for themselves.
fn list(root: &Path) -> Result<std::collections::BTreeSet<PathBuf>> {
    let mut paths = Vec::new();
    tree::walk(root, &mut paths)?;
    let own = ["var/lib/dpkg", "var/log", "var/cache", "run", "proc"].map(|folder| root.join(folder));
    paths.retain(|path| !own.iter().any(|folder| path.starts_with(folder)));
    Ok(paths.into_iter().collect())
}
