//! A QEMU that executes batches.
//!
//! Enters: a program's source and a batch. Leaves: the batch as the program left it. The source is assembled by the binutils of its
//! architecture, into a folder that goes with the run, as do RAM and log. What must never happen: a QEMU that goes on after its
//! deadline, its caller's thread, or its caller.
use crate::batch;
use crate::verdict::{Case, Outcome};
use plimsoll_sys::ProcessId;
use plimsoll_sys::pidfd::{Pidfd, PidfdError, Signal};
use plimsoll_sys::process::end_with_parent;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

/// A batch takes seconds.
const PATIENCE: Duration = Duration::from_secs(120);
/// How much of QEMU's log an error quotes.
const QUOTED_BYTES: usize = 2000;

/// A source, and the address it is assembled for.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// The text.
    pub text: &'static str,
    /// The address.
    pub at: u64,
}

/// A model of a processor.
#[derive(Clone, Copy, Debug)]
pub struct Hardware {
    /// The QEMU.
    pub qemu: &'static str,
    /// Its arguments; `RAM` stands for the options that make RAM a file, `FOLDER` for the run's folder. Nothing may be
    /// merged (`mem-merge=off`): it would be a stranger's memory to a host whose machines share.
    pub arguments: &'static [&'static str],
    /// The prefix of the binutils.
    pub binutils: &'static str,
    /// Flags of the assembler.
    pub flags: &'static [&'static str],
    /// What executes a batch.
    pub program: Source,
    /// What QEMU starts with, where that is in no RAM: left in the run's folder as `firmware`.
    pub firmware: Option<Source>,
    /// Where RAM begins.
    pub ram: u64,
    /// MiB of RAM.
    pub ram_mib: u64,
    /// The status that QEMU exits with when the program is done.
    pub status: i32,
}

/// What the cases of a batch have in common.
#[derive(Clone, Debug, Default)]
pub struct Run<'a> {
    /// Further options for QEMU.
    pub options: &'a [&'a str],
    /// What the program is told once.
    pub words: &'a [u64],
    /// What is in memory from the start, by address.
    pub memory: BTreeMap<u64, u64>,
}

/// A batch was not executed.
#[derive(Debug, thiserror::Error)]
pub enum HardwareError {
    /// A file or a process cannot be had.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The assembler or the linker refused.
    #[error("{command} refused the program: {said}")]
    Assembly {
        /// The command.
        command: String,
        /// What it printed.
        said: String,
    },
    /// QEMU cannot be waited for.
    #[error("cannot wait for QEMU")]
    Wait(#[from] PidfdError),
    /// The program did not reach the end of the batch.
    #[error("QEMU ended with {status} after {done} of {cases} cases: {log}")]
    Ended {
        /// How it ended.
        status: ExitStatus,
        /// Cases done.
        done: u64,
        /// Cases of the batch.
        cases: usize,
        /// The end of its log.
        log: String,
    },
    /// There is no room for the batch.
    #[error("a batch of {bytes} bytes is too long: at most {} fit", batch::BYTES_MAX)]
    TooLong {
        /// Its length.
        bytes: usize,
    },
}

fn cannot(what: impl Into<String>) -> impl FnOnce(io::Error) -> HardwareError {
    |source| HardwareError::Io { what: what.into(), source }
}

impl Hardware {
    /// Executes the cases, in the order given.
    ///
    /// # Errors
    /// The program cannot be assembled or started, or does not reach the end.
    pub fn execute<C: Case>(&self, run: &Run<'_>, cases: &[C]) -> Result<Vec<Outcome>, HardwareError> {
        let mut bytes = batch::write(run.words, cases);
        if bytes.len() as u64 > batch::BYTES_MAX {
            return Err(HardwareError::TooLong { bytes: bytes.len() });
        }
        let folder = tempfile::Builder::new().prefix("plimsoll-oracle-").tempdir();
        let folder = folder.map_err(cannot("make a folder"))?;
        let program = self.assemble(folder.path(), "program", self.program)?;
        if let Some(source) = self.firmware {
            self.assemble(folder.path(), "firmware", source)?;
        }
        let ram = File::options().read(true).write(true).create_new(true).open(folder.path().join("ram"));
        let ram = ram.map_err(cannot("make a file for RAM"))?;
        ram.set_len(self.ram_mib << 20).map_err(cannot("make a file for RAM"))?;
        ram.write_all_at(&program, self.program.at - self.ram).map_err(cannot("write the program"))?;
        ram.write_all_at(&bytes, batch::OFFSET).map_err(cannot("write the batch"))?;

        for (at, word) in &run.memory {
            ram.write_all_at(&word.to_le_bytes(), at - self.ram).map_err(cannot("write a word"))?;
        }

        let status = self.run(folder.path(), run.options)?;
        ram.read_exact_at(&mut bytes, batch::OFFSET).map_err(cannot("read the batch"))?;
        let done = batch::done(&bytes);
        if status.code() != Some(self.status) || done != cases.len() as u64 {
            let log = fs::read(folder.path().join("log")).unwrap_or_default();
            let log = String::from_utf8_lossy(&log[log.len().saturating_sub(QUOTED_BYTES)..]).into_owned();
            return Err(HardwareError::Ended { status, done, cases: cases.len(), log });
        }
        Ok(batch::read(&bytes, cases))
    }

    fn assemble(&self, folder: &Path, name: &str, source: Source) -> Result<Vec<u8>, HardwareError> {
        let file = |extension: &str| folder.join(name).with_extension(extension);
        fs::write(file("s"), source.text).map_err(cannot("write a program's source"))?;
        let mut assembler = Command::new(format!("{}as", self.binutils));
        finish(assembler.args(self.flags).arg("-o").arg(file("o")).arg(file("s")))?;
        let mut linker = Command::new(format!("{}ld", self.binutils));
        finish(linker.arg(format!("-Ttext={:#x}", source.at)).arg("-o").arg(file("elf")).arg(file("o")))?;
        // Not every linker writes memory as it is.
        let binary = folder.join(name);
        let mut copier = Command::new(format!("{}objcopy", self.binutils));
        finish(copier.args(["-O", "binary"]).arg(file("elf")).arg(&binary))?;
        fs::read(binary).map_err(cannot("read a program"))
    }

    fn run(&self, folder: &Path, options: &[&str]) -> Result<ExitStatus, HardwareError> {
        let log = File::create(folder.join("log")).map_err(cannot("make a log"))?;
        let mut command = Command::new(self.qemu);
        command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-accel", "tcg"]);
        let place = folder.display().to_string();
        let ram = format!("memory-backend-file,id=ram,share=on,size={}M,mem-path={place}/ram", self.ram_mib);
        command.args(["-m", &format!("{}M", self.ram_mib), "-object", &ram]);
        command.args(self.arguments.iter().map(|argument| argument.replace("FOLDER", &place)));
        command.args(options).stdin(Stdio::null());
        command.stdout(log.try_clone().map_err(cannot("make a log"))?).stderr(log);
        end_with_parent(&mut command, Signal::KILL);
        let mut child = command.spawn().map_err(cannot(format!("start {}", self.qemu)))?;
        // Nobody has waited for it, so the number is its own even if it has ended.
        let waited = ProcessId::new(child.id()).map(|process| Pidfd::open(process)?.wait_exit(PATIENCE));
        // It may have ended; whether or not, it is reaped.
        let _ = child.kill();
        let status = child.wait().map_err(cannot("wait for QEMU"))?;
        waited.transpose()?;
        Ok(status)
    }
}

fn finish(command: &mut Command) -> Result<(), HardwareError> {
    let output = command.output().map_err(cannot(format!("start {}", command.get_program().display())))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(HardwareError::Assembly { command: command.get_program().display().to_string(), said })
}
