//! What cannot be attached is refused with one sentence that says what was found and what to do.

use crate::fake::{Fake, copy, spawn};
use crate::{MIB_64, nothing_known, skip, unique};
use plimsoll_attach::{AttachLock, Held, Refusal, Request, find, inspect, parse_range};
use plimsoll_sys::ProcessId;
use plimsoll_types::ByteCount;
use rustix::fs::{FlockOperation, flock};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

fn refusal(process: u32) -> String {
    match Held::open(ProcessId::new(process).unwrap()) {
        Ok(held) => inspect(&held, &nothing_known()).unwrap_err().to_string(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn no_process_no_vmm_ourselves_and_the_kernel_are_told_apart() {
    let mut gone = spawn(&mut Command::new("true")).unwrap();
    gone.wait().unwrap();
    assert!(refusal(gone.id()).starts_with(&format!("there is no process {}", gone.id())));
    assert!(refusal(std::process::id()).ends_with("is plimsoll itself"));

    let other = Fake::start("sleeper", "");
    let text = refusal(other.process().get());
    assert!(text.contains("is no virtual machine") && text.contains("sleeper"), "{text}");

    // kthreadd, unless this is a process-id namespace of its own.
    let is_kernel = fs::read_to_string("/proc/2/comm").is_ok_and(|name| name == "kthreadd\n");
    match is_kernel {
        true => assert!(refusal(2).contains("a thread of the kernel")),
        false => println!("SKIPPED: the kernel's threads are not in this process-id namespace"),
    }
}

#[test]
fn a_thread_is_refused_with_its_process() {
    let (tell, told) = std::sync::mpsc::channel();
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        tell.send(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
        ended.recv().unwrap_err();
    });
    let number = u32::try_from(told.recv().unwrap()).unwrap();
    assert_eq!(refusal(number), format!("pid {number} is a thread of {}: attach that", ProcessId::own()));
    drop(end);
    thread.join().unwrap();
}

#[test]
fn ram_that_is_not_there_is_refused_with_what_was_looked_for() {
    let fake = Fake::start("qemu-system-x86_64", "-m 512");
    let text = refusal(fake.process().get());
    assert!(text.contains("looked for ram of 512M") && text.contains("--range"), "{text}");
}

#[test]
fn a_range_that_is_not_mapped_is_refused() {
    let fake = Fake::start("qemu-system-x86_64", "-m 512");
    let request = Request { ranges: vec![parse_range("0x1000-0x2000").unwrap()], ..Request::default() };
    let text = inspect(&fake.held(), &request).unwrap_err().to_string();
    assert_eq!(text, "0x1000-0x2000 cannot be guest RAM: nothing is mapped there; see /proc/PID/maps");
}

#[test]
fn a_qemu_that_was_only_asked_what_it_can_do_is_no_machine() {
    let fake = Fake::start("qemu-system-x86_64", "-S -machine none,accel=kvm:tcg -nodefaults");
    assert!(refusal(fake.process().get()).contains("a VMM without a machine"));
}

#[test]
fn a_device_process_of_a_crosvm_is_refused_with_its_main_process() {
    let name = unique("devices");
    let mut main = Fake::start("crosvm", &format!("run --mem 64 --name {name} kernel"));
    main.tell(&format!("memfd crosvm_guest {MIB_64}"));
    let device: u32 = main.tell("child").parse().unwrap();
    let text = refusal(device);
    assert_eq!(
        text,
        format!("pid {device} is a device process of the crosvm that is {}: attach that", main.process())
    );
    assert!(inspect(&main.held(), &nothing_known()).is_ok());
    assert_eq!(find(&name).unwrap().identity.process, main.process());
}

/// Loops in pause(2): the smallest 32-bit program, one header, one segment, three instructions.
const PAUSE_32: [u8; 93] = {
    let mut elf = [0; 93];
    let parts: [(usize, &[u8]); 6] = [
        // Class 32, little-endian; an executable for the 386; entry after the headers; one program header.
        (0, b"\x7fELF\x01\x01\x01"),
        (16, &[2, 0, 3, 0, 1, 0, 0, 0, 0x54, 0x80, 0x04, 0x08, 52, 0, 0, 0]),
        (40, &[52, 0, 32, 0, 1, 0]),
        // Load all of the file, readable and executable, at 0x0804_8000.
        (52, &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0x80, 0x04, 0x08, 0, 0x80, 0x04, 0x08]),
        (68, &[93, 0, 0, 0, 93, 0, 0, 0, 5, 0, 0, 0, 0, 0x10, 0, 0]),
        // mov eax, 29; int 0x80; jmp to the start.
        (84, &[0xb8, 29, 0, 0, 0, 0xcd, 0x80, 0xeb, 0xf7]),
    ];
    let mut part = 0;
    while part < parts.len() {
        let (place, bytes) = parts[part];
        let mut byte = 0;
        while byte < bytes.len() {
            elf[place + byte] = bytes[byte];
            byte += 1;
        }
        part += 1;
    }
    elf
};

/// Ends its process when the test ends.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn a_32_bit_vmm_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qemu-system-i386");
    crate::fake::write(&path, &PAUSE_32);
    fs::set_permissions(&path, Permissions::from_mode(0o700)).unwrap();
    let child = match spawn(&mut Command::new(&path)) {
        Ok(child) => Reaped(child),
        Err(error) => return println!("SKIPPED: this kernel runs no 32-bit programs: {error}"),
    };
    let text = refusal(child.0.id());
    assert!(text.contains("is not a 64-bit program") && text.contains("qemu-system-i386"), "{text}");
}

#[test]
fn another_users_machine_is_refused_with_the_capability_that_helps_and_counted() {
    if !rustix::process::geteuid().is_root() {
        return skip("root", "not root, so there is no other user to become");
    }
    let fake = Fake::start("qemu-system-x86_64", "-m 64");
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    let tool = folder.path().join("dossier");
    copy("dossier", &tool);
    let as_nobody = |arguments: &[&str]| {
        let mut command = Command::new(&tool);
        command.args(arguments).uid(65534).gid(65534).stdout(Stdio::piped()).stderr(Stdio::piped());
        spawn(&mut command).unwrap().wait_with_output().unwrap()
    };

    let refused = as_nobody(&[&fake.process().get().to_string()]);
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(text.starts_with("not permitted to read /proc/") && text.contains("CAP_SYS_PTRACE"), "{text}");

    let listed = as_nobody(&[]);
    let list: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap();
    assert!(list["unreadable"].as_u64() >= Some(1), "{list}");
}

#[test]
fn a_name_that_nobody_has_lists_the_names_there_are() {
    assert!(matches!(find("no-machine-has-this-name"), Err(Refusal::NoSuchName { .. })));
    assert!(matches!(find("0"), Err(Refusal::NoProcess(0))));
}

#[test]
fn a_machine_has_one_manager_at_a_time() {
    let fake = Fake::start("qemu-system-x86_64", "-m 64");
    let folder = fake.folder.path().join("attach");
    let first = AttachLock::acquire_in(&folder, &fake.held()).unwrap();
    let path = first.path().to_owned();
    let text = AttachLock::acquire_in(&folder, &fake.held()).unwrap_err().to_string();
    assert_eq!(
        text,
        format!("{} is attached already, by {}: end that first", fake.process(), ProcessId::own())
    );
    drop(first);
    assert!(!path.exists());

    // What a manager that was killed has left holds nobody.
    fs::write(&path, "1").unwrap();
    let second = AttachLock::acquire_in(&folder, &fake.held()).unwrap();
    assert_eq!(fs::read_to_string(second.path()).unwrap(), format!("{}\n", std::process::id()));
}

#[test]
fn what_a_balloon_held_before_is_found_by_who_follows_a_manager_that_was_killed_and_by_nobody_else() {
    let fake = Fake::start("qemu-system-x86_64", "-m 64");
    let folder = fake.folder.path().join("attach");
    let first = AttachLock::acquire_in(&folder, &fake.held()).unwrap();
    assert_eq!(first.balloon(), None);
    first.keep(ByteCount::mib(16), None).unwrap();
    assert_eq!((first.balloon(), first.plugged()), (Some(ByteCount::mib(16)), None), "it has no devices");
    first.keep(ByteCount::mib(16), Some(ByteCount::mib(128))).unwrap();
    // Killed: the file stays. Whoever was killed had a longer number.
    let left = fs::read_to_string(first.path()).unwrap();
    drop(first);
    let path = folder.join(format!("{}-{}.lock", fake.process().get(), fake.held().start().0));
    fs::write(&path, format!("9{left}")).unwrap();
    for _ in 0..2 {
        let next = AttachLock::acquire_in(&folder, &fake.held()).unwrap();
        assert_eq!((next.balloon(), next.plugged()), (Some(ByteCount::mib(16)), Some(ByteCount::mib(128))));
        let text = AttachLock::acquire_in(&folder, &fake.held()).unwrap_err().to_string();
        assert!(text.contains(&format!("by {}", ProcessId::own())), "{text}");
        let left = fs::read_to_string(next.path()).unwrap();
        drop(next);
        fs::write(&path, left).unwrap();
    }
    fs::remove_file(&path).unwrap();
    assert_eq!(AttachLock::acquire_in(&folder, &fake.held()).unwrap().balloon(), None);
}

#[test]
fn locks_of_machines_that_have_ended_are_removed_and_no_others() {
    let fake = Fake::start("qemu-system-x86_64", "-m 64");
    let folder = fake.folder.path().join("attach");
    let (process, start) = (fake.process().get(), fake.held().start().0);
    let other = Fake::start("qemu-system-x86_64", "-m 64");
    let running = AttachLock::acquire_in(&folder, &other.held()).unwrap();
    // Of a number that has another process now, of one that nobody has, and of none.
    let stale = [format!("{process}-{}.lock", start - 1), "4194304-7.lock".to_owned()];
    for name in stale.iter().map(String::as_str).chain(["notes.txt", "x-1.lock"]) {
        fs::write(folder.join(name), "1").unwrap();
    }
    let held = AttachLock::acquire_in(&folder, &fake.held()).unwrap();
    assert!(stale.iter().all(|name| !folder.join(name).exists()));
    assert!(folder.join("notes.txt").exists() && folder.join("x-1.lock").exists());
    assert!(held.path().exists() && running.path().exists());
}

#[test]
fn a_lock_goes_with_the_process_that_held_it() {
    let fake = Fake::start("qemu-system-x86_64", "-m 64");
    let folder = fake.folder.path().join("attach");
    let path = AttachLock::acquire_in(&folder, &fake.held()).unwrap().path().to_owned();
    // flock(1) is another manager, as far as the kernel is concerned.
    let holder = match spawn(Command::new("flock").arg(&path).args(["sleep", "600"]).process_group(0)) {
        Ok(holder) => Reaped(holder),
        Err(error) => return println!("SKIPPED: there is no flock(1): {error}"),
    };
    let deadline = Instant::now() + Duration::from_secs(180);
    // Seen without taking it as a manager does, who removes the file that the other may just have opened.
    let is_held = || {
        let file = std::fs::File::open(&path);
        file.is_ok_and(|file| flock(&file, FlockOperation::NonBlockingLockExclusive).is_err())
    };
    while !is_held() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(5));
    }
    let poll = |wanted: fn(&Result<AttachLock, Refusal>) -> bool| loop {
        if wanted(&AttachLock::acquire_in(&folder, &fake.held())) {
            break;
        }
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(5));
    };
    poll(|outcome| matches!(outcome, Err(Refusal::AlreadyAttached { .. })));
    let group = rustix::process::Pid::from_raw(i32::try_from(holder.0.id()).unwrap()).unwrap();
    rustix::process::kill_process_group(group, rustix::process::Signal::KILL).unwrap();
    poll(|outcome| outcome.is_ok());
}

#[test]
fn a_lock_folder_that_others_may_write_to_is_refused() {
    let fake = Fake::start("qemu-system-x86_64", "-m 64");
    let folder = fake.folder.path().join("attach");
    fs::create_dir(&folder).unwrap();
    fs::set_permissions(&folder, Permissions::from_mode(0o777)).unwrap();
    assert!(matches!(AttachLock::acquire_in(&folder, &fake.held()), Err(Refusal::Lock { .. })));
    fs::remove_dir(&folder).unwrap();
    std::os::unix::fs::symlink("/tmp", &folder).unwrap();
    assert!(matches!(AttachLock::acquire_in(&folder, &fake.held()), Err(Refusal::Lock { .. })));
}
