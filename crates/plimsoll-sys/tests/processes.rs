//! Processes, their descriptors and privileges, and messages between them, against the running kernel. Tests that
//! change the process start this very test program again, with a role in the environment.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use plimsoll_sys::ProcessId;
use plimsoll_sys::fdpass::{self, RecvError, SendError};
use plimsoll_sys::pidfd::{Liveness, Pidfd, PidfdError, Signal};
use plimsoll_sys::process::{self, CapabilitySet, GroupId, ParentError, UserId};
use plimsoll_sys::swap::{self, SwapError, SwapPriority, SwapRank};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(180);
const ROLE: &str = "PLIMSOLL_SYS_TEST_ROLE";

/// Runs `test` of this program in a child in which [`is_child`] is true.
fn as_child(test: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env(ROLE, test);
    command
}

fn is_child(test: &str) -> bool {
    std::env::var(ROLE).is_ok_and(|role| role == test)
}

fn is_root() -> bool {
    if rustix::process::geteuid().is_root() {
        return true;
    }
    println!("SKIPPED: needs root");
    false
}

/// A child that lives until its standard input is closed.
fn waiting_child() -> Child {
    Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap()
}

fn pipe() -> (OwnedFd, OwnedFd) {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap()
}

/// True once every write end of the pipe is closed. Children that other tests are just starting hold copies of them
/// for a moment, so this waits; a leaked one makes it give up.
fn writers_are_gone(reader: OwnedFd) -> bool {
    let limit = Timespec::try_from(LIMIT).unwrap();
    poll(&mut [PollFd::new(&reader, PollFlags::IN)], Some(&limit)).unwrap() == 1
        && matches!(File::from(reader).read(&mut [0]), Ok(0))
}

#[test]
fn a_pidfd_sees_its_process_live_and_end() {
    let mut child = waiting_child();
    let pidfd = Pidfd::from_child(&mut child).unwrap();
    assert_eq!(pidfd.process().get(), child.id());
    assert!(pidfd.is_alive().unwrap());
    assert_eq!(pidfd.wait_exit(Duration::from_millis(5)).unwrap(), Liveness::Alive);
    pidfd.send_signal(Signal::KILL).unwrap();
    assert_eq!(pidfd.wait_exit(LIMIT).unwrap(), Liveness::Exited);
    child.wait().unwrap();
    assert!(!pidfd.is_alive().unwrap());
    assert!(matches!(pidfd.send_signal(Signal::TERM), Err(PidfdError::NoProcess(_))));
    assert!(Pidfd::from_child(&mut child).is_err(), "a reaped child is not opened");
}

#[test]
fn a_process_is_opened_once_more_as_another_open_file_while_it_runs() {
    use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
    let mut child = waiting_child();
    let pidfd = Pidfd::from_child(&mut child).unwrap();
    let again = pidfd.reopened().unwrap();
    assert_eq!(again.process(), pidfd.process());
    // Flags are an open file's: a copy of the descriptor would have them, too.
    fcntl_setfl(&again, OFlags::NONBLOCK).unwrap();
    assert!(!fcntl_getfl(&pidfd).unwrap().contains(OFlags::NONBLOCK));
    drop(child.stdin.take());
    assert_eq!(pidfd.wait_exit(LIMIT).unwrap(), Liveness::Exited);
    assert!(pidfd.reopened().is_err(), "it has ended");
    child.wait().unwrap();
    assert!(pidfd.reopened().is_err(), "its number may be another's");
}

#[test]
fn a_descriptor_of_another_process_can_be_copied() {
    let mut child = waiting_child();
    let pidfd = Pidfd::from_child(&mut child).unwrap();
    let copied = pidfd.getfd(0).unwrap();
    let own = rustix::fs::fstat(child.stdin.as_ref().unwrap()).unwrap();
    assert_eq!(rustix::fs::fstat(&copied).unwrap().st_ino, own.st_ino, "the same pipe");
    assert!(matches!(pidfd.getfd(9999), Err(PidfdError::NoDescriptor { number: 9999, .. })));
    drop(child.stdin.take());
    child.wait().unwrap();
}

#[test]
fn bytes_and_descriptors_arrive_together() {
    let stream = UnixStream::pair().map(|(a, b)| (OwnedFd::from(a), OwnedFd::from(b))).unwrap();
    for (left, right) in [fdpass::seqpacket_pair().unwrap(), stream] {
        let (reader, writer) = pipe();
        assert_eq!(fdpass::send(&left, b"hello", &[writer.as_fd()]).unwrap(), 5);
        drop(writer);
        let mut bytes = [0; 16];
        let received = fdpass::recv(&right, &mut bytes, 1).unwrap().unwrap();
        assert_eq!((&bytes[..received.bytes], received.descriptors.len()), (&b"hello"[..], 1));
        let mut copied = File::from(received.descriptors.into_iter().next().unwrap());
        copied.write_all(b"x").unwrap();
        assert_eq!(File::from(reader).read(&mut [0; 4]).unwrap(), 1);
        drop(left);
        assert!(fdpass::recv(&right, &mut bytes, 1).unwrap().is_none(), "closed");
    }
}

#[test]
fn a_truncated_message_is_an_error_and_leaks_no_descriptor() {
    let (left, right) = fdpass::seqpacket_pair().unwrap();
    // Too many descriptors, for room of 0 and of 1 (whose rounded-up buffer has room for a second one).
    for (count, room) in [(1, 0), (2, 1), (5, 2)] {
        let (reader, writer) = pipe();
        fdpass::send(&left, b"m", &vec![writer.as_fd(); count]).unwrap();
        drop(writer);
        let error = fdpass::recv(&right, &mut [0; 8], room).unwrap_err();
        assert!(matches!(error, RecvError::DescriptorsTruncated { .. }), "{count} into {room}: {error}");
        assert!(writers_are_gone(reader), "{count} into {room}");
    }
    // Too many bytes.
    let (reader, writer) = pipe();
    fdpass::send(&left, b"too long", &[writer.as_fd()]).unwrap();
    drop(writer);
    let error = fdpass::recv(&right, &mut [0; 4], 1).unwrap_err();
    assert!(matches!(error, RecvError::BytesTruncated { room: 4 }), "{error}");
    assert!(writers_are_gone(reader));
}

#[test]
fn messages_that_cannot_be_sent_say_so() {
    let (left, right) = fdpass::seqpacket_pair().unwrap();
    assert!(matches!(fdpass::send(&left, b"", &[]), Err(SendError::Empty)));
    let many = vec![left.as_fd(); fdpass::MAX_DESCRIPTORS + 1];
    assert!(matches!(fdpass::send(&left, b"m", &many), Err(SendError::TooManyDescriptors { .. })));
    let most = vec![left.as_fd(); fdpass::MAX_DESCRIPTORS];
    fdpass::send(&left, b"m", &most).unwrap();
    let received = fdpass::recv(&right, &mut [0; 1], fdpass::MAX_DESCRIPTORS).unwrap().unwrap();
    assert_eq!(received.descriptors.len(), fdpass::MAX_DESCRIPTORS);
    drop((received, right));
    assert!(matches!(fdpass::send(&left, b"m", &[]), Err(SendError::Closed)));
}

#[test]
fn the_peer_of_a_pair_is_this_process() {
    let (left, _right) = fdpass::seqpacket_pair().unwrap();
    let peer = fdpass::peer_credentials(&left).unwrap();
    assert_eq!(peer.process, Some(ProcessId::own()));
    assert_eq!(peer.uid, rustix::process::geteuid().as_raw());
    assert!(fdpass::peer_credentials(pipe().0).is_err());
}

#[test]
fn privileges_are_dropped_in_all_threads() {
    const NAME: &str = "privileges_are_dropped_in_all_threads";
    if !is_child(NAME) {
        if is_root() {
            assert!(as_child(NAME).status().unwrap().success());
        }
        return;
    }
    let (user, group) = (UserId::new(65534).unwrap(), GroupId::new(65533).unwrap());
    let (stay, wait) = std::sync::mpsc::channel::<()>();
    let other = thread::spawn(move || {
        let _ = wait.recv();
        rustix::process::geteuid().as_raw()
    });
    assert!(process::effective_capabilities().unwrap().contains(CapabilitySet::SYS_ADMIN));
    process::drop_privileges(user, group).unwrap();
    drop(stay);
    assert_eq!(other.join().unwrap(), 65534, "a thread that was already there");
    assert!(rustix::process::getgroups().unwrap().is_empty());
    assert!(process::effective_capabilities().unwrap().is_empty());
    assert!(process::drop_privileges(UserId::new(1).unwrap(), group).is_err(), "no way to another user");
    process::no_new_privileges().unwrap();
    assert!(rustix::thread::no_new_privs().unwrap());
}

#[test]
fn a_child_dies_with_its_parent() {
    const NAME: &str = "a_child_dies_with_its_parent";
    if !is_child(NAME) {
        let mut middle = as_child(NAME).stdout(Stdio::piped()).spawn().unwrap();
        let output = middle.stdout.as_mut().unwrap();
        let mut said = String::new();
        while !said.ends_with("ready\n") {
            let mut byte = [0];
            assert_eq!(output.read(&mut byte).unwrap(), 1, "the middle process ended early: {said}");
            said.push(char::from(byte[0]));
        }
        let number = said.lines().find_map(|line| line.strip_prefix("tied=")).unwrap();
        let tied = Pidfd::open(ProcessId::new(number.parse().unwrap()).unwrap()).unwrap();
        let before = tied.is_alive().unwrap();
        middle.kill().unwrap();
        middle.wait().unwrap();
        let after = tied.wait_exit(LIMIT).unwrap();
        if after == Liveness::Alive {
            tied.send_signal(Signal::KILL).unwrap();
        }
        assert_eq!((before, after), (true, Liveness::Exited));
        return;
    }
    use std::os::unix::process::CommandExt;
    let parent = ProcessId::own();
    // Ends by itself only after the test would have given up.
    let mut command = Command::new("sleep");
    command.arg("60");
    // SAFETY: the closure makes two system calls and allocates nothing.
    #[expect(unsafe_code, reason = "the request has to be made in the child")]
    unsafe {
        command.pre_exec(move || {
            process::set_parent_death_signal(parent, Signal::KILL)
                .map_err(|_| std::io::ErrorKind::Other.into())
        });
    }
    let mut child = command.spawn().unwrap();
    println!("\ntied={}\nready", child.id());
    // Stay until killed.
    child.wait().unwrap();
}

#[test]
fn a_wrong_parent_is_noticed() {
    const NAME: &str = "a_wrong_parent_is_noticed";
    if !is_child(NAME) {
        assert!(as_child(NAME).status().unwrap().success());
        return;
    }
    let error = process::set_parent_death_signal(ProcessId::own(), Signal::KILL).unwrap_err();
    assert!(matches!(error, ParentError::Gone { .. }), "{error}");
}

#[test]
fn an_inheritable_descriptor_lives_on_in_a_program() {
    let (reader, writer) = pipe();
    let path = format!("/proc/self/fd/{}", writer.as_raw_fd());
    let exists = || Command::new("test").args(["-e", &path]).status().unwrap().success();
    assert!(!exists());
    process::make_inheritable(&writer).unwrap();
    assert!(exists());
    drop(reader);
}

#[test]
fn what_is_no_swap_area_is_refused() {
    if !is_root() {
        return;
    }
    let missing = swap::swapon(Path::new("/nonexistent/plimsoll"), SwapPriority::Lowest).unwrap_err();
    assert!(matches!(missing, SwapError::Other { .. }), "{missing}");
    let path = std::env::temp_dir().join(format!("plimsoll-sys-swap-{}", std::process::id()));
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    let zeros = swap::swapon(&path, SwapPriority::Lowest).unwrap_err();
    let off = swap::swapoff(&path).unwrap_err();
    std::fs::remove_file(&path).unwrap();
    assert!(matches!(zeros, SwapError::NotSwap(_)), "{zeros}");
    assert!(matches!(off, SwapError::NotSwap(_)), "{off}");
}

#[test]
fn a_swap_area_is_used_between_on_and_off() {
    if !is_root() {
        return;
    }
    // The header of a swap area: version 1 and the last page at byte 1024, the signature at the end of the page.
    let mut area = vec![0u8; 64 << 12];
    area[1024..1028].copy_from_slice(&1u32.to_ne_bytes());
    area[1028..1032].copy_from_slice(&63u32.to_ne_bytes());
    area[4086..4096].copy_from_slice(b"SWAPSPACE2");
    let path = Path::new("/var/tmp").join(format!("plimsoll-sys-area-{}", std::process::id()));
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).unwrap();
    file.write_all(&area).and_then(|()| file.sync_all()).unwrap();
    let listed = || std::fs::read_to_string("/proc/swaps").unwrap().contains(path.to_str().unwrap());
    let on = swap::swapon(&path, SwapPriority::Fixed(SwapRank::new(0).unwrap()));
    let (during, again) = (listed(), swap::swapon(&path, SwapPriority::Lowest));
    let off = swap::swapoff(&path);
    std::fs::remove_file(&path).unwrap();
    if let Err(error) = on {
        println!("SKIPPED: no swap files on this file system: {error}");
        return;
    }
    assert!(during, "not in /proc/swaps");
    assert!(matches!(again, Err(SwapError::Busy(_))), "{again:?}");
    off.unwrap();
}
