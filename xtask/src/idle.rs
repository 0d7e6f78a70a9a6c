//! Every way a kernel has to see which pages are used, on a kernel that has them all: idle flags and DAMON of address spaces are
//! in hardly any that is shipped.
//!
//! Enters: a Debian machine, root. Leaves: what the test of `plimsoll-linux` that compares them said in an emulated machine, and a
//! kernel below `target/idle` that is not built again. What must never happen: a test that did not run counting as passed.
use crate::cargo;
use crate::setup;
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The sources, and what builds them: package, and a file it is installed by.
const NEEDS: [(&str, &str); 10] = [
    ("linux-source-6.12", SOURCES),
    ("make", "/usr/bin/make"),
    ("gcc", "/usr/bin/gcc"),
    ("bc", "/usr/bin/bc"),
    ("flex", "/usr/bin/flex"),
    ("bison", "/usr/bin/bison"),
    ("xz-utils", "/usr/bin/xz"),
    ("libelf-dev", "/usr/include/libelf.h"),
    ("busybox-static", "/bin/busybox"),
    ("qemu-system-x86", "/usr/bin/qemu-system-x86_64"),
];
const SOURCES: &str = "/usr/src/linux-source-6.12.tar.xz";
/// The folder in it.
const UNPACKED: &str = "linux-source-6.12";
const IMAGE: &str = "arch/x86/boot/bzImage";
const CONFIG: &str = include_str!("idle.config");
const INIT: &str = include_str!("idle.init");

/// Builds what is missing, runs the test, and repeats what it said.
pub(crate) fn run() -> Result<()> {
    let missing: Vec<&str> =
        NEEDS.iter().filter(|(_, file)| !Path::new(file).exists()).map(|(package, _)| *package).collect();
    setup::install(&missing)?;
    let folder = cargo::root().join("target/idle");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let image = kernel(&folder)?;
    let archive = initramfs(&folder, &test_program()?)?;
    println!("running the test in an emulated machine: about a minute");
    let mut machine = Command::new("qemu-system-x86_64");
    machine.args(["-M", "q35", "-accel", "tcg", "-cpu", "max", "-m", "1G", "-display", "none", "-no-reboot"]);
    machine.args(["-serial", "stdio", "-append", "console=ttyS0 quiet panic=-1"]);
    machine.arg("-kernel").arg(image).arg("-initrd").arg(archive);
    let output =
        machine.stdin(Stdio::null()).stderr(Stdio::inherit()).output().context("cannot start QEMU")?;
    let said = String::from_utf8_lossy(&output.stdout);
    println!("{said}");
    if !said.contains("test result: ok. 1 passed")
        || said.contains("not compared")
        || said.contains("no hints")
    {
        bail!("the sources were not all compared, or one of them failed: what it said is above");
    }
    Ok(())
}

/// The kernel's image: built when there is none.
fn kernel(folder: &Path) -> Result<PathBuf> {
    let sources = folder.join(UNPACKED);
    let image = sources.join(IMAGE);
    if image.exists() {
        return Ok(image);
    }
    let path = folder.join("build.log");
    println!("building a kernel: about ten minutes; what is said goes to {}", path.display());
    let log = File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
    let logged = |command: &mut Command| -> Result<()> {
        cargo::run(command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log.try_clone()?))
            .with_context(|| format!("see {}", path.display()))
    };
    logged(Command::new("tar").arg("-xf").arg(SOURCES).current_dir(folder))?;
    let make = || {
        let mut make = Command::new("make");
        make.current_dir(&sources);
        make
    };
    logged(make().arg("tinyconfig"))?;
    // What is said last holds.
    let config = sources.join(".config");
    let text = fs::read_to_string(&config).with_context(|| format!("cannot read {}", config.display()))?;
    fs::write(&config, text + CONFIG)?;
    logged(make().arg("olddefconfig"))?;
    let settled = fs::read_to_string(&config)?;
    let unset =
        CONFIG.lines().find(|line| line.starts_with("CONFIG") && !settled.lines().any(|one| one == *line));
    if let Some(line) = unset {
        bail!("these sources have no {line}");
    }
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    logged(make().arg(format!("-j{jobs}")).arg("bzImage"))?;
    Ok(image)
}

fn test_program() -> Result<PathBuf> {
    println!("building the test");
    let programs = cargo::test_programs(&["--package", "plimsoll-linux", "--test", "kernel"])?;
    let program = programs.into_iter().next().context("cargo named no program")?;
    Ok(program.program)
}

/// The test program, what it is linked with, and the first process, packed.
fn initramfs(folder: &Path, program: &Path) -> Result<PathBuf> {
    let root = folder.join("root");
    if root.exists() {
        fs::remove_dir_all(&root)?;
    }
    fs::create_dir_all(root.join("bin"))?;
    let put = |from: &Path, to: &str| -> Result<()> {
        let to = root.join(to.trim_start_matches('/'));
        to.parent().map_or(Ok(()), fs::create_dir_all)?;
        fs::copy(from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
        Ok(())
    };
    put("/bin/busybox".as_ref(), "bin/busybox")?;
    symlink("busybox", root.join("bin/sh"))?;
    cargo::run(Command::new("objcopy").arg("--strip-debug").arg(program).arg(root.join("bin/tests")))?;
    let linked = Command::new("ldd").arg(program).output().context("cannot start ldd")?;
    let linked = String::from_utf8_lossy(&linked.stdout).into_owned();
    for library in linked.split_whitespace().filter(|word| word.starts_with('/')) {
        put(library.as_ref(), library)?;
    }
    fs::write(root.join("init"), INIT)?;
    fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755))?;
    let archive = folder.join("initramfs");
    let mut pack = Command::new("sh");
    pack.args(["-c", "find . | busybox cpio -o -H newc"]).current_dir(&root).stderr(Stdio::null());
    cargo::run(pack.stdout(File::create(&archive)?))?;
    Ok(archive)
}
