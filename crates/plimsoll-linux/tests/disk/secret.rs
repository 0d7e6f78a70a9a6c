//! The key of a tier, as somebody looks for it who can read all memory of the process that uses it.
use crate::faulty::FaultyDisk;
use crate::world::World;
use plimsoll_linux::disk::tier::{Keepsakes, Limits, Tier};
use plimsoll_sys::fdpass;
use plimsoll_sys::mapping::SecretPage;
use plimsoll_types::ByteCount;
use std::hint::black_box;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;

const NAME: &str = "secret::a_key_in_use_is_nowhere_in_the_memory_of_its_process";
const ROLE: &str = "PLIMSOLL_TEST_USES_A_KEY";
/// What the process that is looked at has in its memory, so that looking is known to find it.
const DECOY: [u8; 16] = *b"a decoy as large";

/// Ends with its owner.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The process that is looked at: pages go to the disk, come back and are cleaned, by several threads.
fn use_the_key() {
    let socket = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let received = fdpass::recv(&socket, &mut [0], 2).unwrap().unwrap();
    let [table, key] = <[OwnedFd; 2]>::try_from(received.descriptors).unwrap();
    let decoy = black_box(Box::new(DECOY));
    let tier = Tier::inherit(Box::new(FaultyDisk::default()), table, Some(key), None).unwrap();
    let mut world = World::with(tier, None);
    for seed in 1..=1000 {
        world.put(1, seed * 2);
    }
    std::thread::scope(|scope| scope.spawn(|| world.demote_all().unwrap()).join()).unwrap();
    world.read_all();
    world.release_those(|at| !at.is_multiple_of(3));
    world.demote_all().unwrap();
    let _ = world.clean();
    world.read_all();
    fdpass::send(&socket, &[1], &[]).unwrap();
    // Until whoever looks has gone.
    let _ = fdpass::recv(&socket, &mut [0], 0);
    black_box(decoy);
}

/// How often each of some patterns is in the memory of a process, and how much could be read of it.
fn found(process: u32, patterns: &[&[u8]]) -> (Vec<usize>, usize) {
    let memory = std::fs::File::open(format!("/proc/{process}/mem")).unwrap();
    let maps = std::fs::read_to_string(format!("/proc/{process}/maps")).unwrap();
    let (mut counts, mut looked_at) = (vec![0; patterns.len()], 0);
    for (range, _) in maps.lines().filter_map(|line| line.split_once(" r")) {
        let (start, end) = range.split_once('-').unwrap();
        let [start, end] = [start, end].map(|text| u64::from_str_radix(text, 16).unwrap());
        let mut bytes = vec![0; usize::try_from(end - start).unwrap()];
        // Secret memory, and what the kernel has there itself, is not read.
        let Ok(()) = memory.read_exact_at(&mut bytes, start) else { continue };
        looked_at += bytes.len();
        for (count, pattern) in counts.iter_mut().zip(patterns) {
            *count += bytes.windows(pattern.len()).filter(|window| window == pattern).count();
        }
    }
    (counts, looked_at)
}

#[test]
fn a_key_in_use_is_nowhere_in_the_memory_of_its_process() {
    if std::env::var_os(ROLE).is_some() {
        return use_the_key();
    }
    let limits = Limits { disk: ByteCount::mib(16), domain: None };
    let tier = Tier::create(Box::new(FaultyDisk::default()), limits).unwrap();
    let Keepsakes { table, key, .. } = tier.keepsakes();
    let Some(key) = key else {
        println!("SKIPPED: this kernel has no secret memory");
        return;
    };
    let (ours, theirs) = fdpass::seqpacket_pair().unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", NAME]).env(ROLE, "1").stdin(Stdio::from(theirs)).stdout(Stdio::null());
    let child = Ended(command.spawn().unwrap());
    drop(command);
    fdpass::send(&ours, &[1], &[table, key]).unwrap();
    let done = fdpass::recv(&ours, &mut [0], 0).unwrap();
    assert!(done.is_some(), "it has failed");
    let page = SecretPage::inherit(key.try_clone_to_owned().unwrap()).unwrap();
    let key: Vec<u8> = page.as_atomic_u64s()[1..5]
        .iter()
        .flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes())
        .collect();
    assert_ne!(key, [0; 32]);
    // A cipher has a key in two rows of 16 bytes. Those of it that are left over say as much as all of it.
    let (counts, looked_at) = found(child.0.id(), &[&DECOY, &key[..16], &key[16..], &key[..8], &key[24..]]);
    assert!(looked_at > 1 << 20 && counts[0] > 0, "{looked_at} bytes, {counts:?}");
    assert_eq!(counts[1..], [0; 4], "the key, or a half, or a quarter of it, in {looked_at} bytes");
}
