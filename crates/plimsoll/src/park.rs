//! `plimsoll park` and `plimsoll wake`: a daemon's machine leaves memory, and comes back.
//!
//! Enters: which machine of which daemon. Leaves: exit status 0 when the daemon has begun it, which it goes on with by itself; 2
//! when there is no such daemon or machine.
use crate::live::DIRECTORY;
use crate::verb::ended;
use clap::Args;
use plimsoll_host::daemon::place;
use plimsoll_host::daemon::status::{Answer, MachineStatus, Request, Status};
use plimsoll_linux::explain;
use plimsoll_sys::fdpass;
use plimsoll_types::ByteCount;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// How long a daemon may take to answer: it may be taking machines over.
const PATIENCE: Timespec = Timespec { tv_sec: 35, tv_nsec: 0 };
/// Some thousand machines.
const ANSWER_MAX: usize = 4 << 20;

#[derive(Args)]
pub(crate) struct ParkArgs {
    /// Its name, or its number.
    machine: String,
    /// Where the daemon's sockets are.
    #[arg(long, value_name = "DIR", default_value = DIRECTORY)]
    directory: PathBuf,
}

pub(crate) fn park(args: &ParkArgs) -> ExitCode {
    let asked = order(args, |machine| Request::Park { machine }).map(|(machine, status)| {
        let MachineStatus { name, size_bytes, resident_bytes, .. } = machine;
        let to = if status.disk.is_some() { "the disk" } else { "the store: the daemon has no disk" };
        println!("{name}: {} of {} leave memory for {to}", ByteCount(resident_bytes), ByteCount(size_bytes));
        ExitCode::SUCCESS
    });
    ended("park", asked)
}

pub(crate) fn wake(args: &ParkArgs) -> ExitCode {
    let asked = order(args, |machine| Request::Wake { machine }).map(|(machine, _)| {
        println!("{}: what it used before it was parked comes back", machine.name);
        ExitCode::SUCCESS
    });
    ended("wake", asked)
}

/// Has the daemon do it, and returns how things were before.
fn order(args: &ParkArgs, request: fn(u32) -> Request) -> Result<(MachineStatus, Status), String> {
    let refused = |answer| match answer {
        Answer::Refused(why) => why,
        Answer::Done | Answer::Status(_) => "the daemon gave an answer to another question".to_owned(),
    };
    let status = match ask(&args.directory, &Request::Status)? {
        Answer::Status(status) => *status,
        answer => return Err(refused(answer)),
    };
    let machine = choose(&status, &args.machine)?.clone();
    match ask(&args.directory, &request(machine.id))? {
        Answer::Done => Ok((machine, status)),
        answer => Err(refused(answer)),
    }
}

/// The machine that is meant.
fn choose<'a>(status: &'a Status, named: &str) -> Result<&'a MachineStatus, String> {
    let is_meant = |machine: &&MachineStatus| machine.name == named || named.parse() == Ok(machine.id);
    let meant: Vec<&MachineStatus> = status.machines.iter().filter(is_meant).collect();
    let list = |machines: &mut dyn Iterator<Item = &MachineStatus>| {
        machines.map(|machine| format!("{} ({})", machine.name, machine.id)).collect::<Vec<_>>().join(", ")
    };
    match meant[..] {
        [machine] => Ok(machine),
        [] if status.machines.is_empty() => Err(format!("{named}: the daemon has no machine")),
        [] => Err(format!("{named}: the daemon has {}", list(&mut status.machines.iter()))),
        _ => Err(format!("{named} may be {}: give a number", list(&mut meant.into_iter()))),
    }
}

fn ask(directory: &Path, request: &Request) -> Result<Answer, String> {
    let path = directory.join(place::CONTROL);
    let socket = fdpass::seqpacket_connect(&path)
        .map_err(|error| format!("no daemon answers at {}: {error}; name its --directory", path.display()))?;
    let text = serde_json::to_vec(request).map_err(|error| error.to_string())?;
    fdpass::send(&socket, &text, &[]).map_err(|error| explain(&error))?;
    if !poll(&mut [PollFd::new(&socket, PollFlags::IN)], Some(&PATIENCE)).is_ok_and(|ready| ready > 0) {
        return Err(format!("the daemon at {} does not answer", path.display()));
    }
    let mut bytes = vec![0; ANSWER_MAX];
    let received = fdpass::recv(&socket, &mut bytes, 0).map_err(|error| explain(&error))?;
    let received =
        received.ok_or("the daemon closed the connection: its manager may just have been replaced")?;
    let answer = bytes.get(..received.bytes).unwrap_or_default();
    serde_json::from_slice(answer).map_err(|error| format!("the daemon's answer makes no sense: {error}"))
}
