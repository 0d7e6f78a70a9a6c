//! Pictures of values over time.
//!
//! Enters: times, layers of values, a unit. Leaves: an SVG with both axes, their units, and a legend. Values are drawn as
//! curves, or stacked as areas that fill the whole.
use crate::html::Escaped;
use plimsoll_policy::Ppm;
use plimsoll_types::ByteCount;
use std::fmt::{self, Write};

/// What values are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Sizes.
    Bytes,
    /// Millionths.
    Part,
}

impl Unit {
    fn show(self, value: u64) -> String {
        match self {
            Self::Bytes => ByteCount(value).to_string(),
            Self::Part => Ppm(u32::try_from(value).unwrap_or(u32::MAX)).to_string(),
        }
    }

    /// A round step between marks, so that about four reach `most`.
    fn step(self, most: u64) -> u64 {
        let least = (most / 4).max(1);
        match self {
            Self::Bytes => {
                let power = 1 << least.ilog2();
                if least > power + power / 2 { power * 2 } else { power }
            }
            Self::Part => {
                let power = 10u64.pow(least.ilog10());
                [1, 2, 5]
                    .map(|factor| factor * power)
                    .into_iter()
                    .find(|step| *step >= least)
                    .unwrap_or(power * 10)
            }
        }
    }
}

/// Values of one kind, one for each time.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    pub(crate) name: &'static str,
    /// The class it has in the style.
    pub(crate) class: &'static str,
    pub(crate) values: Vec<u64>,
}

/// A picture.
pub(crate) struct Plot<'a> {
    pub(crate) title: &'static str,
    pub(crate) unit: Unit,
    /// What the upper edge stands for, at least.
    pub(crate) most: u64,
    pub(crate) times: &'a [u64],
    /// What the right edge stands for.
    pub(crate) seconds: u64,
    pub(crate) layers: Vec<Layer>,
    pub(crate) is_stacked: bool,
}

const WIDTH: u64 = 900;
const LEFT: u64 = 70;
const TOP: u64 = 30;
const HEIGHT: u64 = 200;
const BOTTOM: u64 = 46;
const INNER: u64 = WIDTH - LEFT - 20;

/// Steps between the marks of time, in seconds.
const TIME_STEPS: [u64; 12] =
    [1, 5, 15, 60, 300, 900, 1800, 3600, 3 * 3600, 6 * 3600, 24 * 3600, 7 * 24 * 3600];

impl Plot<'_> {
    /// Writes it.
    pub(crate) fn draw(&self, out: &mut String) -> fmt::Result {
        writeln!(
            out,
            "<svg viewBox=\"0 0 {WIDTH} {}\" role=\"img\" aria-label=\"{}\">",
            TOP + HEIGHT + BOTTOM,
            Escaped(self.title)
        )?;
        self.marks(out)?;
        if self.is_stacked {
            self.areas(out)?
        } else {
            self.curves(out)?
        }
        self.legend(out)?;
        out.write_str("</svg>\n")
    }

    fn top(&self) -> u64 {
        let step = self.unit.step(self.most);
        self.most.div_ceil(step).max(1) * step
    }

    fn x(&self, seconds: u64) -> u64 {
        LEFT + (INNER * seconds).checked_div(self.seconds).unwrap_or(0)
    }

    /// In hundredths of a unit: a thin layer is seen.
    fn y(&self, value: u64) -> String {
        let up = u128::from(HEIGHT * 100) * u128::from(value.min(self.top())) / u128::from(self.top());
        let down = (TOP + HEIGHT) * 100 - u64::try_from(up).unwrap_or(HEIGHT * 100);
        format!("{}.{:02}", down / 100, down % 100)
    }

    fn marks(&self, out: &mut String) -> fmt::Result {
        let (right, bottom) = (LEFT + INNER, TOP + HEIGHT);
        for value in
            (0..=self.top()).step_by(usize::try_from(self.unit.step(self.most)).unwrap_or(usize::MAX))
        {
            let y = self.y(value);
            writeln!(
                out,
                "<line class=\"axis\" x1=\"{LEFT}\" y1=\"{y}\" x2=\"{right}\" y2=\"{y}\"/>\
                 <text x=\"{}\" y=\"{y}\" dy=\"4\" text-anchor=\"end\">{}</text>",
                LEFT - 8,
                self.unit.show(value)
            )?;
        }
        let step =
            TIME_STEPS.into_iter().find(|step| self.seconds / step <= 12).unwrap_or(self.seconds.max(1));
        for seconds in (0..=self.seconds).step_by(usize::try_from(step).unwrap_or(usize::MAX)) {
            writeln!(
                out,
                "<line class=\"axis\" x1=\"{0}\" y1=\"{bottom}\" x2=\"{0}\" y2=\"{1}\"/>\
                 <text x=\"{0}\" y=\"{2}\" text-anchor=\"middle\">{3}</text>",
                self.x(seconds),
                bottom + 5,
                bottom + 20,
                clock(seconds, step)
            )?;
        }
        writeln!(
            out,
            "<text x=\"{right}\" y=\"{}\" text-anchor=\"end\">time since the start, {}</text>",
            bottom + 40,
            time_unit(step)
        )
    }

    fn curves(&self, out: &mut String) -> fmt::Result {
        for layer in &self.layers {
            write!(out, "<polyline class=\"curve {}\" points=\"", layer.class)?;
            for (seconds, value) in self.times.iter().zip(&layer.values) {
                write!(out, "{},{} ", self.x(*seconds), self.y(*value))?;
            }
            out.write_str("\"/>\n")?;
        }
        Ok(())
    }

    /// Each layer on top of those before it; a time's value holds until the next.
    fn areas(&self, out: &mut String) -> fmt::Result {
        let ends = self.times.iter().skip(1).copied().chain([self.seconds]);
        let spans: Vec<(u64, u64)> = self.times.iter().copied().zip(ends).collect();
        let mut below = vec![0; self.times.len()];
        for layer in &self.layers {
            let above: Vec<u64> =
                below.iter().zip(&layer.values).map(|(below, value)| below + value).collect();
            write!(out, "<polygon class=\"{}\" points=\"", layer.class)?;
            for ((start, end), value) in spans.iter().zip(&above) {
                let y = self.y(*value);
                write!(out, "{},{y} {},{y} ", self.x(*start), self.x(*end))?;
            }
            for ((start, end), value) in spans.iter().zip(&below).rev() {
                let y = self.y(*value);
                write!(out, "{},{y} {},{y} ", self.x(*end), self.x(*start))?;
            }
            out.write_str("\"/>\n")?;
            below = above;
        }
        Ok(())
    }

    fn legend(&self, out: &mut String) -> fmt::Result {
        for (layer, index) in self.layers.iter().zip(0..) {
            let x = LEFT + index * 150;
            writeln!(
                out,
                "<rect class=\"{}\" x=\"{x}\" y=\"8\" width=\"12\" height=\"10\"/><text x=\"{}\" y=\"17\">{}</text>",
                layer.class,
                x + 18,
                Escaped(layer.name)
            )?;
        }
        Ok(())
    }
}

fn time_unit(step: u64) -> &'static str {
    match step {
        0..60 => "s",
        60..3600 => "min",
        3600..86_400 => "hours",
        _ => "days",
    }
}

fn clock(seconds: u64, step: u64) -> String {
    match step {
        0..60 => seconds.to_string(),
        60..3600 => (seconds / 60).to_string(),
        3600..86_400 => (seconds / 3600).to_string(),
        _ => (seconds / 86_400).to_string(),
    }
}
