//! What a process in one of the daemon's roles may do, tried by such a process.
//!
//! Enters: this program itself, started again for each role, to run one test within it. Leaves: nothing. What is given up is gone for a
//! process's life, so each role has a process of its own; the thread that runs the test gives up first, and looks at itself.
#![expect(clippy::unwrap_used, reason = "a step that cannot be taken fails its test")]

use plimsoll_host::daemon::rights::table::{KEPT, set};
use plimsoll_host::daemon::rights::{Filter, Role, give_up, give_up_again};
use plimsoll_sys::blocks::{BLOCK_SIZE, Blocks};
use plimsoll_sys::process::CapabilitySet;
use plimsoll_sys::ring::{Read, ReadRing};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket, socketpair};
use std::io;
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};

/// In the environment of whoever is in a role: whether its filter is on.
const WITHIN: &str = "PLIMSOLL_TEST_WITHIN";

#[test]
fn a_keeper_uses_no_capability_hands_three_on_and_may_make_the_calls_of_its_list() {
    in_a_process_of_its_own(
        "a_keeper_uses_no_capability_hands_three_on_and_may_make_the_calls_of_its_list",
        Role::Keeper,
    );
}

#[test]
fn a_manager_has_three_capabilities_and_starts_programs_that_have_no_more() {
    in_a_process_of_its_own(
        "a_manager_has_three_capabilities_and_starts_programs_that_have_no_more",
        Role::Manager,
    );
}

#[test]
fn a_manager_on_a_host_without_virsh_starts_no_program() {
    in_a_process_of_its_own("a_manager_on_a_host_without_virsh_starts_no_program", Role::Alone);
}

fn in_a_process_of_its_own(test: &str, role: Role) {
    if let Ok(is_filtered) = std::env::var(WITHIN) {
        return within(role, is_filtered == "true");
    }
    for is_filtered in ["true", "false"] {
        let mut own = Command::new(std::env::current_exe().unwrap());
        let ended = own.args(["--exact", test, "--nocapture"]).env(WITHIN, is_filtered).output().unwrap();
        let said = String::from_utf8_lossy(&ended.stdout) + String::from_utf8_lossy(&ended.stderr);
        assert!(ended.status.success() && said.contains("1 passed"), "filtered: {is_filtered}: {said}");
    }
}

/// The value of a line of this thread's status.
fn status(name: &str) -> String {
    let text = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_default().trim().to_owned()
}

fn capabilities(name: &str) -> CapabilitySet {
    CapabilitySet::from_bits_retain(u64::from_str_radix(&status(name), 16).unwrap())
}

fn refused<T>(result: Result<T, Errno>) -> bool {
    result.is_err_and(|errno| errno == Errno::NOSYS)
}

fn starts_a_program() -> io::Result<bool> {
    let mut program = Command::new("/bin/true");
    Ok(program.stdin(Stdio::null()).stdout(Stdio::null()).status()?.success())
}

/// Whether a ring can be made.
fn makes_a_ring() -> Result<(), Errno> {
    ReadRing::new(2).map(drop).map_err(|error| Errno::from_io_error(&error.source).unwrap())
}

/// A file that is named now is read by a ring that was made before.
fn reads(ring: &mut ReadRing) {
    let file = rustix::fs::memfd_create("test-rights", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::io::pwrite(&file, &[7; BLOCK_SIZE], 0).unwrap();
    ring.set_file(Some(file.as_fd())).unwrap();
    assert!(ring.begin(Read { ticket: 1, offset: 0, blocks: Blocks::new(1), done: 0 }).is_ok());
    let mut ended = Vec::new();
    while ended.is_empty() {
        ring.wait(&mut ended).unwrap();
    }
    assert_eq!(*ended[0].outcome.as_ref().unwrap(), BLOCK_SIZE);
    assert_eq!(ended[0].read.blocks.bytes(), [7; BLOCK_SIZE]);
}

fn within(role: Role, is_filtered: bool) {
    let mut ring = ReadRing::new(2).unwrap();
    let filters = || status("Seccomp_filters").parse::<u32>().unwrap();
    let (permitted, bounding, before) = (capabilities("CapPrm"), capabilities("CapBnd"), filters());
    let may_cut = capabilities("CapEff").contains(CapabilitySet::SETPCAP);
    give_up(role, if is_filtered { Filter::Refuse } else { Filter::Off }).unwrap();

    let kept = set(KEPT);
    let used = if role == Role::Keeper { CapabilitySet::empty() } else { permitted & kept };
    assert_eq!(capabilities("CapPrm"), permitted & kept);
    assert_eq!(capabilities("CapEff"), used);
    assert_eq!(capabilities("CapBnd"), if may_cut { bounding & kept } else { bounding });
    assert_eq!(capabilities("CapAmb") | capabilities("CapInh"), CapabilitySet::empty());
    assert_eq!(status("NoNewPrivs"), "1");
    assert_eq!(filters(), before + u32::from(is_filtered));

    // What every role needs.
    let pair = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
    assert!(pair.is_ok());
    plimsoll_sys::process::refuse_dumps().unwrap();
    assert!(TcpListener::bind("127.0.0.1:0").is_ok() && rustix::process::getgroups().is_ok());
    assert_eq!(std::thread::spawn(|| vec![1_u8; 16 << 20].len()).join().unwrap(), 16 << 20);
    reads(&mut ring);
    // A keeper's managers make one, and then no more.
    assert_eq!(refused(makes_a_ring()), is_filtered && role != Role::Keeper);
    // What none does, of something that is not there: whoever may make the call hears that.
    let missing = "/nonexistent/x";
    assert_eq!(refused(rustix::mount::unmount(missing, rustix::mount::UnmountFlags::empty())), is_filtered);
    assert_eq!(refused(rustix::process::chroot(missing)), is_filtered);
    assert_eq!(refused(rustix::fs::symlink("x", missing)), is_filtered);
    assert_eq!(refused(socket(AddressFamily::NETLINK, SocketType::RAW, None)), is_filtered);
    if !is_filtered {
        return;
    }
    assert_eq!(status("Seccomp"), "2");
    match (role, starts_a_program()) {
        (Role::Keeper | Role::Manager, started) => assert!(started.unwrap()),
        (Role::Alone, started) => {
            assert_eq!(started.unwrap_err().raw_os_error(), Some(Errno::NOSYS.raw_os_error()));
        }
    }
    if role == Role::Keeper {
        // A keeper that takes its place adds no filter, a manager its own.
        give_up_again(Filter::Refuse).unwrap();
        assert_eq!(filters(), before + 1);
        give_up(Role::Manager, Filter::Refuse).unwrap();
        assert_eq!(filters(), before + 2);
        assert!(refused(makes_a_ring()));
        reads(&mut ring);
    }
    assert!(give_up(role, Filter::Refuse).is_err(), "a filter that could be changed is none");
}
