//! Assembles the corpus that compressible pages are cut from: this crate's own sources, then the same sources
//! with their identifiers renamed until there is enough.
//!
//! What enters is this package alone, so that neither an edit elsewhere nor publishing changes what pages
//! contain. What leaves is `corpus.bin` in the build's output folder, a whole number of words.
use std::{
    collections::BTreeMap,
    env, fs, io,
    path::{Path, PathBuf},
};

/// Bytes of the corpus. More than the last-level cache lines a page compressor keeps, little enough to embed.
const CORPUS_SIZE: usize = 160 << 10;

fn main() -> io::Result<()> {
    let package = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").ok_or(io::ErrorKind::NotFound)?);
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or(io::ErrorKind::NotFound)?);
    let mut files = vec![package.join("build.rs")];
    for folder in ["src", "tests"] {
        rust_files(&package.join(folder), &mut files)?;
    }
    files.sort();

    let mut sources = String::new();
    for file in &files {
        println!("cargo::rerun-if-changed={}", file.display());
        sources.push_str(&fs::read_to_string(file)?);
    }
    let mut corpus = sources.clone();
    let mut round = 0;
    while corpus.len() < CORPUS_SIZE {
        round += 1;
        corpus.push_str(&renamed(&sources, round));
    }
    let mut corpus = corpus.into_bytes();
    corpus.truncate(CORPUS_SIZE);
    fs::write(out.join("corpus.bin"), corpus)
}

/// The Rust files below a folder; a folder that is not packaged counts as empty.
fn rust_files(folder: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    if !folder.is_dir() {
        return Ok(());
    }
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            rust_files(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

/// The same text with every word of four letters or more replaced by another word of the text of the same
/// length, each always by the same one. Structure, lengths and repetition stay as people wrote them.
fn renamed(text: &str, round: usize) -> String {
    let words = || text.split(|c: char| !c.is_ascii_alphabetic()).filter(|word| word.len() >= 4);
    let mut by_length: BTreeMap<usize, Vec<&str>> = BTreeMap::new();
    for word in words() {
        let same_length = by_length.entry(word.len()).or_default();
        if let Err(place) = same_length.binary_search(&word) {
            same_length.insert(place, word);
        }
    }
    let mut result = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find(|c: char| c.is_ascii_alphabetic()) {
        let (before, from) = rest.split_at(start);
        let end = from.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(from.len());
        let (word, after) = from.split_at(end);
        result.push_str(before);
        let same_length = by_length.get(&word.len()).map_or(&[][..], Vec::as_slice);
        match same_length.binary_search(&word) {
            Ok(place) => result.push_str(same_length[(place + round * 37) % same_length.len()]),
            Err(_) => result.push_str(word),
        }
        rest = after;
    }
    result.push_str(rest);
    result
}
