//! The guest programs on the host: contents, layout, and every program over plain memory.
#[cfg(test)]
mod content;
#[cfg(test)]
mod frames;
#[cfg(test)]
mod heap;
#[cfg(test)]
mod layout;
#[cfg(test)]
mod machine;
#[cfg(test)]
mod probe;
#[cfg(test)]
mod programs;
