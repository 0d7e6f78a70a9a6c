//! Programs that run inside guests, built by the build script of whoever embeds them.
//!
//! Enters: where a program's package lies. Leaves: the program, in `$OUT_DIR`. Such a package is a workspace of its own, with
//! another profile and other link arguments, so another cargo builds it. What must never happen: what the outer build was told
//! about compilers, wrappers and flags reaching it: `cargo clippy` names a wrapper that produces no code, and a
//! `target-cpu=native` would put instructions into a guest whose processor may lack them.
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, io};

const TARGET: &str = "x86_64-unknown-linux-gnu";
const REMOVED: [&str; 9] = [
    "RUSTFLAGS",
    "RUSTC_WRAPPER",
    "RUSTC_WORKSPACE_WRAPPER",
    "CARGO_BUILD_RUSTC_WRAPPER",
    "CARGO_BUILD_RUSTC_WORKSPACE_WRAPPER",
    "CARGO_BUILD_RUSTFLAGS",
    "CARGO_BUILD_TARGET",
    "CARGO_BUILD_TARGET_DIR",
    "CARGO_TARGET_DIR",
];
const REMOVED_PREFIXES: [&str; 3] =
    ["CARGO_PROFILE_", "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_", "CARGO_FEATURE_"];

/// A program for guests.
#[derive(Clone, Copy, Debug)]
pub struct Program<'a> {
    /// Its package's folder, below that of the package whose build script this is.
    pub package: &'a str,
    /// The binary's name.
    pub binary: &'a str,
    /// Flags of its compiler.
    pub flags: &'a str,
    /// What it is built again for when it changes, below the same folder as `package`.
    pub sources: &'a [&'a str],
}

impl Program<'_> {
    /// Builds it and leaves it as `$OUT_DIR/NAME`.
    ///
    /// # Errors
    /// When this is no build script, or the program does not build; the compiler has said why.
    pub fn build(&self, name: &str) -> io::Result<()> {
        let own = folder("CARGO_MANIFEST_DIR")?;
        for source in self.sources {
            println!("cargo::rerun-if-changed={}", own.join(source).display());
        }
        let out = folder("OUT_DIR")?;
        let target_dir = out.join(self.binary);
        let manifest = own.join(self.package).join("Cargo.toml");
        if !self.cargo(&manifest, &target_dir)?.status()?.success() {
            let why = format!("{} did not build; its messages are above", self.binary);
            return Err(io::Error::other(why));
        }
        fs::copy(target_dir.join(TARGET).join("release").join(self.binary), out.join(name))?;
        Ok(())
    }

    fn cargo(&self, manifest: &Path, target_dir: &Path) -> io::Result<Command> {
        let mut cargo = Command::new(folder("CARGO")?);
        for (name, _) in env::vars_os() {
            let text = name.to_string_lossy();
            if REMOVED.contains(&&*text) || REMOVED_PREFIXES.iter().any(|prefix| text.starts_with(prefix)) {
                cargo.env_remove(&name);
            }
        }
        // Set rather than removed: it outranks every configuration file.
        cargo.env("CARGO_ENCODED_RUSTFLAGS", self.flags);
        cargo.args(["build", "--release", "--locked", "--target", TARGET, "--manifest-path"]);
        cargo.arg(manifest).arg("--target-dir").arg(target_dir);
        Ok(cargo)
    }
}

fn folder(variable: &str) -> io::Result<PathBuf> {
    let missing = || io::Error::new(io::ErrorKind::NotFound, format!("cargo did not set {variable}"));
    env::var_os(variable).map(PathBuf::from).ok_or_else(missing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_outer_build_was_told_does_not_reach_the_program() {
        let program = Program { package: "p", binary: "b", flags: "-Cx", sources: &[] };
        // Cargo sets both for its tests; the second is what a build script must not pass on.
        let command = program.cargo(Path::new("m"), Path::new("t")).unwrap();
        let set: Vec<_> =
            command.get_envs().map(|(name, value)| (name.to_owned(), value.is_some())).collect();
        assert!(set.contains(&("CARGO_ENCODED_RUSTFLAGS".into(), true)));
        assert!(env::vars_os().all(|(name, _)| {
            let text = name.to_string_lossy().into_owned();
            let is_removed =
                REMOVED.contains(&&*text) || REMOVED_PREFIXES.iter().any(|start| text.starts_with(start));
            !is_removed || set.contains(&(name, false))
        }));
        assert!(command.get_args().any(|argument| argument == "--locked"));
    }
}
