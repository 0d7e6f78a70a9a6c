//! QEMU's command line, and its process.
//!
//! Enters: options and the files of a guest. Leaves: a process that ends when this is dropped, or when the thread that started
//! it ends, however that comes.
use crate::files::Files;
use crate::options::{Accel, Backing, Merge, Options};
use plimsoll_sys::ProcessId;
use plimsoll_sys::pidfd::{Pidfd, Signal};
use plimsoll_sys::process::end_with_parent;
use plimsoll_types::ByteCount;
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

pub(crate) const PROGRAM: &str = "qemu-system-x86_64";

/// How the guest comes into being.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Birth {
    Boot,
    Migration,
}

/// A QEMU.
#[derive(Debug)]
pub(crate) struct Qemu {
    child: Child,
    pidfd: Pidfd,
}

impl Qemu {
    /// Starts it. What it complains about goes to a log.
    pub(crate) fn start(options: &Options, birth: Birth, files: &Files, kernel: &Path) -> io::Result<Self> {
        let log = File::create(files.qemu_log())?;
        let mut command = Command::new(PROGRAM);
        command.args(arguments(options, birth, files, kernel));
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        if let Some((user, group)) = options.user {
            command.uid(user.get()).gid(group.get());
        }
        end_with_parent(&mut command, Signal::KILL);
        let mut child = command.spawn()?;
        match hold(&child) {
            Ok(pidfd) => Ok(Self { child, pidfd }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    pub(crate) const fn pidfd(&self) -> &Pidfd {
        &self.pidfd
    }
}

/// A hold on a child that nobody has waited for, and whose number is therefore its own even if it has ended.
pub(crate) fn hold(child: &Child) -> io::Result<Pidfd> {
    let process = ProcessId::new(child.id()).ok_or(io::ErrorKind::InvalidData)?;
    Pidfd::open(process).map_err(io::Error::other)
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may have ended; whether or not, it is reaped.
        let _ = self.pidfd.send_signal(Signal::KILL);
        let _ = self.child.wait();
    }
}

fn arguments(options: &Options, birth: Birth, files: &Files, kernel: &Path) -> Vec<String> {
    let mut machine = "q35".to_owned();
    if options.merge == Merge::Off {
        machine += ",mem-merge=off";
    }
    let mut arguments = words(&["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
    arguments.extend(memory(options, &mut machine));
    let mut add = |pairs: &[(&str, String)]| {
        arguments.extend(pairs.iter().flat_map(|(name, value)| [(*name).to_owned(), value.clone()]));
    };
    let accel = match options.accel {
        Accel::Tcg => "tcg",
        Accel::Kvm => "kvm",
    };
    add(&[
        ("-machine", machine),
        ("-accel", accel.to_owned()),
        ("-smp", options.cpus.to_string()),
        ("-kernel", kernel.display().to_string()),
        ("-initrd", files.initramfs().display().to_string()),
        ("-append", options.command_line()),
        ("-serial", format!("file:{}", files.kernel_log().display())),
        ("-chardev", format!("socket,id=console,path={}", escaped(&files.console()))),
        ("-serial", "chardev:console".to_owned()),
        ("-chardev", format!("socket,id=monitor,path={}", escaped(&files.monitor()))),
        ("-mon", "chardev=monitor,mode=control".to_owned()),
        // For a manager: it takes one connection after the other.
        ("-qmp", format!("unix:{},server=on,wait=off", escaped(&files.qmp()))),
    ]);
    if let Some(disk) = &options.disk {
        // Past the host's cache too, straight from the file into guest RAM, which the host's kernel pins meanwhile.
        let file = escaped(disk.path());
        add(&[
            ("-drive", format!("file={file},format=raw,if=none,id=disk,cache=none,aio=native")),
            ("-device", "virtio-blk-pci,drive=disk".to_owned()),
        ]);
    }
    for device in &options.devices {
        add(&[("-device", device.clone())]);
    }
    if birth == Birth::Migration {
        add(&[("-incoming", "defer".to_owned())]);
    }
    arguments.extend_from_slice(&options.arguments);
    arguments
}

/// RAM the way QEMU is told of it: as a plain size where that is all there is to say, as objects otherwise.
fn memory(options: &Options, machine: &mut String) -> Vec<String> {
    let mut arguments = words(&["-m", &mib(options.memory())]);
    let [only] = options.nodes.as_slice() else {
        for (number, node) in options.nodes.iter().enumerate() {
            let (object, memdev) =
                (object(number, node.size, node.backing), format!("node,memdev=ram{number}"));
            arguments.extend(words(&["-object", &object, "-numa", &memdev]));
        }
        return arguments;
    };
    if only.backing == Backing::Memfd {
        arguments.extend(words(&["-object", &object(0, only.size, only.backing)]));
        machine.push_str(",memory-backend=ram0");
    }
    arguments
}

fn object(number: usize, size: ByteCount, backing: Backing) -> String {
    let kind = match backing {
        Backing::Anonymous => "memory-backend-ram,share=off",
        Backing::Memfd => "memory-backend-memfd,share=on",
    };
    format!("{kind},id=ram{number},size={}", mib(size))
}

fn mib(size: ByteCount) -> String {
    format!("{}M", size.0 >> 20)
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

/// A path inside an option, where a comma stands for itself when doubled.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}
