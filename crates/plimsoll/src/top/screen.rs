//! The terminal: taken, and given back as it was.
use plimsoll_linux::explain;
use ratatui::{DefaultTerminal, Frame};

/// A terminal that is ours until this is dropped. A panic gives it back before it is said.
pub(super) struct Screen(DefaultTerminal);

impl Screen {
    pub(super) fn open() -> Result<Self, String> {
        let failed = |error| format!("this terminal cannot be drawn on: {}; use --once", explain(&error));
        ratatui::try_init().map(Self).map_err(failed)
    }

    pub(super) fn draw(&mut self, picture: impl FnOnce(&mut Frame<'_>)) -> Result<(), String> {
        // A terminal that was closed cannot be told.
        self.0.draw(picture).map(|_| ()).map_err(|error| explain(&error))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // Nothing is left to do about a terminal that is gone.
        let _ = self.0.show_cursor();
        let _ = ratatui::try_restore();
    }
}
