//! This machine's files, booted by a systemd of their own: what a unit and a package do where systemd runs.
//!
//! Enters: files to put over the machine's. Leaves: a systemd that is asked as any is, by commands that run inside. What must never happen:
//! anything of the machine changed, or anything left once this process has ended, however it does; what sees to both stands in
//! `booted.sh`. Root is needed, and systemd installed; it need not be what runs this machine.
//!
//! `plimsoll`'s own tests use this file as well, so it knows of nothing else here.
use std::fs;
use std::io::{self, Error};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const SCRIPT: &str = include_str!("booted.sh");
/// How long it may take to come up: a second where nothing else runs.
const PATIENCE: Duration = Duration::from_secs(180);
const PAUSE: Duration = Duration::from_millis(20);

/// A systemd that runs, and ends with this.
pub(crate) struct Booted {
    /// The shell that has it run as long as it has an input.
    shell: Child,
    init: u32,
}

impl Booted {
    /// Boots one in `folder`, which is made, and removed at the end. What `prepare` puts into the folders it is given lies over the
    /// machine's files, and is a program (or a symbolic link to one) in /usr/bin.
    pub(crate) fn start(
        folder: &Path,
        prepare: impl FnOnce(&Path, &Path) -> io::Result<()>,
    ) -> io::Result<Self> {
        let begin = || {
            let [over, files, programs] = ["over", "files", "programs"].map(|name| folder.join(name));
            for part in [&over, &files, &programs] {
                fs::create_dir_all(part)?;
            }
            prepare(&files, &programs)?;
            fs::write(folder.join("booted.sh"), SCRIPT)?;
            let mut command = Command::new("unshare");
            command.args(["--mount", "--propagation", "private", "sh"]).arg(folder.join("booted.sh"));
            command.args(["run", &format!("plimsoll-booted-{}", std::process::id())]).stdin(Stdio::piped());
            // What is sent to this process's group, as by a terminal, does not reach it: it has to clean up.
            command.process_group(0).spawn()
        };
        let shell = begin().inspect_err(|_| drop(fs::remove_dir_all(folder)))?;
        let mut booted = Self { shell, init: 0 };
        let deadline = Instant::now() + PATIENCE;
        while !booted.is_up() {
            if let Some(status) = booted.shell.try_wait()? {
                return Err(Error::other(format!("it did not boot: {status}")));
            }
            if Instant::now() >= deadline {
                return Err(Error::other("systemd does not come up"));
            }
            std::thread::sleep(PAUSE);
        }
        Ok(booted)
    }

    /// A command that runs inside, as root. It is in the process's own control group, which is none of a unit.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--target={}", self.init));
        command.args(["--mount", "--pid", "--uts", "--ipc", "--net", "--cgroup", "--root", "--wd", program]);
        command
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("DEBIAN_FRONTEND", "noninteractive");
        command.env("SYSTEMD_UNIT_PATH", "/etc/trial").stdin(Stdio::null());
        command
    }

    /// Runs a command inside to its end.
    pub(crate) fn output(&self, words: &[&str]) -> io::Result<Output> {
        let (program, words) = words.split_first().ok_or_else(|| Error::other("no program"))?;
        self.command(program).args(words).output()
    }

    /// What a property of a unit is, as `systemctl show` has it.
    pub(crate) fn property(&self, unit: &str, name: &str) -> io::Result<String> {
        let said = self.output(&["systemctl", "show", "--value", "--property", name, unit])?;
        Ok(String::from_utf8_lossy(&said.stdout).trim().to_owned())
    }

    /// What the units have said so far.
    pub(crate) fn journal(&self) -> io::Result<String> {
        let said = self.output(&["journalctl", "--no-pager", "--quiet", "--output=cat"])?;
        Ok(String::from_utf8_lossy(&said.stdout).into_owned())
    }

    /// A path inside, as it is reached from here.
    pub(crate) fn path(&self, inside: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{inside}", self.init))
    }

    /// It is systemd by now, no shell that prepares, and says that it is up. Before that nobody may be asked: it would be the machine's own.
    fn is_up(&mut self) -> bool {
        let Some(init) = children(self.shell.id()).into_iter().flat_map(children).next() else {
            return false;
        };
        self.init = init;
        let program = fs::read_link(format!("/proc/{init}/exe"));
        let is_systemd = program.is_ok_and(|program| program.ends_with("lib/systemd/systemd"));
        let said = || self.output(&["systemctl", "is-system-running"]);
        is_systemd && said().is_ok_and(|said| [&b"running\n"[..], b"degraded\n"].contains(&&*said.stdout))
    }
}

impl Drop for Booted {
    fn drop(&mut self) {
        // As if this process had ended.
        drop(self.shell.stdin.take());
        let _ = self.shell.wait();
    }
}

fn children(process: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{process}/task/{process}/children")).unwrap_or_default();
    text.split_whitespace().filter_map(|child| child.parse().ok()).collect()
}
