//! Runs the program and looks at what it says and at what it leaves.
use plimsoll_host::control::host_pressure;
use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A program that runs longer than this, beyond the time it was given, hangs.
const PATIENCE: Duration = Duration::from_secs(240);
/// How long anything may take that another process does: much where nothing else runs, enough where much does.
pub(crate) const GOING: Duration = Duration::from_secs(180);
/// It runs units for tests, whatever runs the machine's.
const SYSTEMD: &str = "/usr/lib/systemd/systemd";
/// In the environment of everything a test starts, and so of everything that starts in turn.
const MARK: &str = "PLIMSOLL_TEST_MARK";

/// Held while a test runs guests: two at once would compete for the machine's memory and time.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether this machine can run the test. One that lacks what `PLIMSOLL_REQUIRE` says it has is at fault.
pub(crate) fn can(capability: &str) -> bool {
    let missing = match capability {
        "kvm" => open("/dev/kvm"),
        "userfaultfd" => faults(),
        "cgroup" if controllers() => None,
        "cgroup" => Some("this user may make no memory cgroup".to_owned()),
        "zram" if is_root() && Path::new("/sys/class/zram-control").exists() => None,
        "zram" => Some("this user may make no zram device, or the kernel has none".to_owned()),
        "ksm" if is_root() && Path::new("/sys/kernel/mm/ksm/general_profit").exists() => None,
        "ksm" => Some("not root, or this kernel's KSM does not count its profit".to_owned()),
        "qemu" => {
            let path = std::env::var_os("PATH").unwrap_or_default();
            let is_here =
                std::env::split_paths(&path).any(|folder| folder.join("qemu-system-x86_64").exists());
            (!is_here).then(|| "no qemu-system-x86_64".to_owned())
        }
        "browser" => {
            let playwright = "/../../target/playwright/node_modules/playwright-core";
            let playwright = format!("{}{playwright}", env!("CARGO_MANIFEST_DIR"));
            let needed = ["/usr/bin/chromium", "/usr/bin/node", &playwright];
            let missing = needed.into_iter().find(|path| !Path::new(path).exists());
            missing.map(|path| format!("no {path}: `cargo xtask setup` brings it"))
        }
        "systemd" if is_root() && Path::new(SYSTEMD).exists() => None,
        "systemd" => Some("not root, or no systemd: `cargo xtask setup` brings it".to_owned()),
        "pressure" => {
            host_pressure().is_none().then(|| "this kernel tells nobody of memory pressure".to_owned())
        }
        "root" if is_root() => None,
        "root" => Some("not root".to_owned()),
        other => panic!("no test knows of {other}"),
    };
    let Some(missing) = missing else { return true };
    let required = std::env::var("PLIMSOLL_REQUIRE").unwrap_or_default();
    assert!(!required.split(',').any(|name| name == capability), "{capability} is required: {missing}");
    println!("SKIPPED: {missing}");
    false
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn open(device: &str) -> Option<String> {
    let opened = fs::OpenOptions::new().read(true).write(true).open(device);
    opened.err().map(|error| format!("{device}: {error}"))
}

fn faults() -> Option<String> {
    if is_root()
        || fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").is_ok_and(|text| text.trim() == "1")
    {
        return None;
    }
    open("/dev/userfaultfd")
}

fn controllers() -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    is_root()
        && mounts.lines().any(|line| line.split(' ').nth(2).is_some_and(|kind| kind.starts_with("cgroup")))
}

/// One start of the program, and everything it may leave behind.
pub(crate) struct Run {
    mark: String,
    folder: PathBuf,
    swaps: BTreeSet<String>,
    command: Command,
    lasting: Duration,
}

impl Run {
    /// Runs the program with these words, in an empty folder of its own.
    pub(crate) fn new(words: &[&str]) -> Self {
        Self::of(Path::new(env!("CARGO_BIN_EXE_plimsoll")), words)
    }

    /// The same, of another copy of the program.
    pub(crate) fn of(program: &Path, words: &[&str]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let mark = format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let folder = std::env::temp_dir().join(format!("plimsoll-test-{mark}"));
        fs::create_dir(&folder).unwrap();
        let mut command = Command::new(program);
        command.args(words).current_dir(&folder).env(MARK, &mark);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self { mark, folder, swaps: swaps(), command, lasting: Duration::ZERO }
    }

    /// Runs it with that in its environment.
    pub(crate) fn with(mut self, name: &str, value: &Path) -> Self {
        self.command.env(name, value);
        self
    }

    /// Runs it as that user and group.
    pub(crate) fn by(mut self, id: u32) -> Self {
        use std::os::unix::process::CommandExt;
        self.command.uid(id).gid(id);
        self
    }

    /// In a process group of its own, as a shell starts what it starts.
    pub(crate) fn in_a_group_of_its_own(mut self) -> Self {
        use std::os::unix::process::CommandExt;
        self.command.process_group(0);
        self
    }

    /// It was told to work that long.
    pub(crate) fn lasting(mut self, seconds: u64) -> Self {
        self.lasting = Duration::from_secs(seconds);
        self
    }

    /// Waits for its end.
    pub(crate) fn output(self) -> Ended {
        self.start().wait()
    }

    /// Starts it.
    pub(crate) fn start(mut self) -> Running {
        let mut child = self.command.spawn().unwrap();
        let stderr = read_all(child.stderr.take().unwrap());
        let stdout = read_all(child.stdout.take().unwrap());
        Running { run: self, child, stdout, stderr, started: Instant::now() }
    }
}

/// The program while it runs.
pub(crate) struct Running {
    run: Run,
    child: Child,
    stdout: JoinHandle<String>,
    stderr: JoinHandle<String>,
    started: Instant,
}

impl Running {
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// The signal that a terminal sends: to it and to all that it started.
    pub(crate) fn signal_group(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process_group(pid, signal).unwrap();
    }

    /// Whether it has a thread of that name.
    pub(crate) fn has_thread(&self, name: &str) -> bool {
        let threads = fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let names = threads.filter_map(|thread| fs::read_to_string(thread.ok()?.path().join("comm")).ok());
        names.into_iter().any(|found| found.trim_end() == name)
    }

    /// Waits until that many machines run as processes of their own.
    pub(crate) fn wait_for_machines(&mut self, count: usize) {
        wait_until("its machines run", || {
            assert!(self.child.try_wait().unwrap().is_none(), "it ended before its machines ran");
            marked(&self.run.mark).len() > count
        });
    }

    /// Has it count as one that has run for longer than anything may wait.
    pub(crate) fn age(&mut self) {
        self.started -= 2 * (PATIENCE + self.run.lasting);
    }

    /// Waits for its end and reads what it has said.
    pub(crate) fn wait(mut self) -> Ended {
        // However long it has run by now.
        let asked = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if asked.elapsed() > PATIENCE + self.run.lasting {
                self.child.kill().unwrap();
                self.child.wait().unwrap();
                panic!("it hung, and said\n{}\n{}", self.stdout.join().unwrap(), self.stderr.join().unwrap());
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let (stdout, stderr) = (self.stdout.join().unwrap(), self.stderr.join().unwrap());
        Ended { run: self.run, pid: self.child.id(), status, stdout, stderr, took: self.started.elapsed() }
    }
}

/// What it said and left.
pub(crate) struct Ended {
    run: Run,
    pid: u32,
    status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) took: Duration,
}

impl Ended {
    pub(crate) fn expect_code(&self, code: i32) -> &Self {
        assert_eq!(self.status.code(), Some(code), "{}\n{}\n{}", self.status, self.stdout, self.stderr);
        self
    }

    pub(crate) fn code(&self) -> Option<i32> {
        self.status.code()
    }

    pub(crate) fn first_line(&self) -> &str {
        self.stdout.lines().next().unwrap_or("")
    }

    /// A file it was to write into its folder.
    pub(crate) fn json(&self, name: &str) -> serde_json::Value {
        serde_json::from_slice(&fs::read(self.run.folder.join(name)).unwrap()).unwrap()
    }

    pub(crate) fn remove(&self, name: &str) {
        fs::remove_file(self.run.folder.join(name)).unwrap();
    }

    /// Nothing is left: no process, no control group, no swap, no file. Swap of tests beside this one comes and goes.
    pub(crate) fn expect_nothing_left(&self) {
        wait_at_most(PATIENCE, "no swap is left", || swaps().is_subset(&self.run.swaps));
        self.expect_nothing_of_its_own_left();
    }

    /// Nothing but swap, of which nobody can tell whose it is: for tests beside which others make some.
    pub(crate) fn expect_nothing_of_its_own_left(&self) {
        assert_eq!(marked(&self.run.mark), Vec::<u32>::new(), "processes");
        self.expect_no_cgroup();
        let files: Vec<_> =
            fs::read_dir(&self.run.folder).unwrap().map(|file| file.unwrap().path()).collect();
        assert_eq!(files, Vec::<PathBuf>::new(), "files");
    }

    pub(crate) fn expect_no_cgroup(&self) {
        assert_eq!(cgroups_of(self.pid), Vec::<PathBuf>::new(), "control groups");
    }

    /// Its machines end although nobody is left to end them.
    pub(crate) fn expect_machines_to_end(&self) {
        wait_until("its machines end", || marked(&self.run.mark).is_empty());
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Waits for something that another process does, and fails when it does not.
pub(crate) fn wait_until(what: &str, is_so: impl FnMut() -> bool) {
    wait_at_most(GOING, what, is_so);
}

fn wait_at_most(patience: Duration, what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < patience, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn read_all(from: impl std::io::Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let lines = BufReader::new(from).lines().map_while(Result::ok);
        lines.fold(String::new(), |text, line| text + &line + "\n")
    })
}

/// Processes that carry a mark.
fn marked(mark: &str) -> Vec<u32> {
    let wanted = format!("{MARK}={mark}");
    let folders = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let pids = folders.filter_map(|folder| folder.file_name().to_str()?.parse::<u32>().ok());
    let carries = |pid: &u32| {
        // One that has just ended carries nothing.
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|variable| variable == wanted.as_bytes())
    };
    pids.filter(carries).collect()
}

/// Control groups made by that process for its run.
pub(crate) fn cgroups_of(pid: u32) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::from("/sys/fs/cgroup")];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for path in entries.filter_map(Result::ok).map(|entry| entry.path()) {
            if !path.is_dir() || path.is_symlink() {
                continue;
            }
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if name.starts_with(&format!("plimsoll-demo-{pid}-")) {
                found.push(path.clone());
            }
            folders.push(path);
        }
    }
    found
}

/// Devices and their sizes; how full they are changes by itself.
fn swaps() -> BTreeSet<String> {
    let text = fs::read_to_string("/proc/swaps").unwrap();
    text.lines().map(|line| line.split_whitespace().take(3).collect::<Vec<_>>().join(" ")).collect()
}
