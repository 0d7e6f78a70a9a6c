//! Starts processes that look like VMMs: a copy of `fake_vmm` in a folder of its own under the wanted file name.

use plimsoll_attach::Held;
use plimsoll_sys::{HvaRange, ProcessId};
use std::fs;
use std::io::{self, BufRead, BufReader, Lines, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Mutex;
use tempfile::TempDir;

/// The example beside this test, which cargo builds with it.
pub(crate) fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let built = test.parent().unwrap().parent().unwrap().join("examples").join(name);
    assert!(built.exists(), "{} is not built: run `cargo test -p plimsoll-attach`", built.display());
    built
}

/// Held while a program's file is written and while a process is started: a child that is started meanwhile inherits the
/// file open for writing, and until it has executed its own program, nobody can execute the file.
static FILES: Mutex<()> = Mutex::new(());

/// A copy of an example under that path.
pub(crate) fn copy(example_name: &str, path: &Path) {
    let _files = FILES.lock().unwrap();
    fs::copy(example(example_name), path).unwrap();
}

/// Writes a program's file.
pub(crate) fn write(path: &Path, bytes: &[u8]) {
    let _files = FILES.lock().unwrap();
    fs::write(path, bytes).unwrap();
}

/// Starts a process.
pub(crate) fn spawn(command: &mut Command) -> io::Result<Child> {
    let _files = FILES.lock().unwrap();
    command.spawn()
}

/// A copy of `fake_vmm` under that name in the folder.
pub(crate) fn program(folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(name);
    copy("fake_vmm", &path);
    path
}

/// A running process that looks like a VMM. Dropping it ends it.
pub(crate) struct Fake {
    pub(crate) folder: TempDir,
    child: Child,
    input: Option<ChildStdin>,
    output: Lines<BufReader<ChildStdout>>,
}

impl Fake {
    /// Starts `name` with the words of `line` as arguments.
    pub(crate) fn start(name: &str, line: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = program(folder.path(), name);
        let arguments = line.split(' ').filter(|word| !word.is_empty());
        let mut fake = Self::run(folder, Command::new(path).args(arguments));
        assert_eq!(fake.answer(), "ready");
        fake
    }

    /// Runs that command, and does not wait until it is ready.
    pub(crate) fn run(folder: TempDir, command: &mut Command) -> Self {
        let mut child = spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped())).unwrap();
        let output = BufReader::new(child.stdout.take().unwrap()).lines();
        let input = child.stdin.take();
        Self { folder, child, input, output }
    }

    pub(crate) fn process(&self) -> ProcessId {
        ProcessId::new(self.child.id()).unwrap()
    }

    pub(crate) fn held(&self) -> Held {
        Held::open(self.process()).unwrap()
    }

    /// Has it do something, and gives its answer.
    pub(crate) fn tell(&mut self, command: &str) -> String {
        self.ask(command).unwrap_or_else(|why| panic!("{command}: {why}"))
    }

    /// Has it do something that the kernel may not have, and gives its answer, or why it did not.
    pub(crate) fn ask(&mut self, command: &str) -> Result<String, String> {
        writeln!(self.input.as_mut().unwrap(), "{command}").unwrap();
        let answer = self.answer();
        if answer.starts_with("failed") { Err(answer) } else { Ok(answer) }
    }

    fn answer(&mut self) -> String {
        self.output.next().unwrap().unwrap()
    }

    /// Has it map memory, and gives the place.
    pub(crate) fn map(&mut self, command: &str) -> HvaRange {
        plimsoll_attach::parse_range(&self.tell(command)).unwrap()
    }

    /// Ends it, and waits until it is gone.
    pub(crate) fn end(&mut self) {
        drop(self.input.take());
        self.child.wait().unwrap();
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        drop(self.input.take());
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
