//! What was measured, for people and for programs: nothing is shown here that is not in the JSON.

use std::{collections::BTreeMap, fmt::Write as _};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::{
    bed::Mode,
    place::Place,
    plan::Figure,
    stats::{Compared, Series},
};

/// What strangers may take of the machine before its clock tells more of them than of us.
const NOISY: f64 = 0.1;

/// The values of one figure in one mode.
pub(super) struct Measured {
    pub figure: Figure,
    pub mode: Mode,
    pub values: Vec<f64>,
}

/// How the connections of a mode were carried, by the agents' own words.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Carried {
    pub mode: Mode,
    pub connections: BTreeMap<String, usize>,
}

impl Carried {
    pub(super) fn ways(&self) -> String {
        let ways: Vec<String> = self.connections.iter().map(|(way, count)| format!("{way} ({count})")).collect();
        if ways.is_empty() { "no agent".to_owned() } else { ways.join("; ") }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Report {
    pub place: Place,
    pub rounds: usize,
    pub quick: bool,
    pub carried: Vec<Carried>,
    /// Shares of the machine, over all measurements.
    pub others: Option<Series>,
    pub idle: Option<Series>,
    /// What was not measured, and why.
    pub notes: Vec<String>,
    pub rows: Vec<Row>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Row {
    #[serde(flatten)]
    pub figure: Figure,
    pub mode: Mode,
    /// As it is shown: it says what the mode's name does not.
    pub label: String,
    #[serde(flatten)]
    pub series: Series,
    pub to_none: Option<Compared>,
    pub to_proxied: Option<Compared>,
    pub to_sidecar: Option<Compared>,
}

/// Puts each figure beside the same figure of the modes that all are compared with.
pub(super) fn rows(measured: Vec<Measured>) -> Vec<Row> {
    let all: Vec<(Figure, Mode, Series)> = measured
        .into_iter()
        .filter_map(|measured| Some((measured.figure, measured.mode, Series::of(measured.values)?)))
        .collect();
    let beside = |figure: &Figure, mode: Mode, base: Mode, series: &Series| {
        let base = all.iter().find(|(other, of, _)| other == figure && *of == base && mode != base);
        // What the base has none of cannot be divided by it.
        base.filter(|(_, _, base)| base.median > 0.0).map(|(_, _, base)| series.compared_to(base))
    };
    let row = |(figure, mode, series): &(Figure, Mode, Series)| Row {
        to_none: beside(figure, *mode, Mode::None, series),
        to_proxied: beside(figure, *mode, proxied_of(*mode), series),
        to_sidecar: beside(figure, *mode, Mode::Sidecar, series),
        figure: figure.clone(),
        mode: *mode,
        label: mode.label().to_owned(),
        series: series.clone(),
    };
    all.iter().map(row).collect()
}

/// What a mode is put beside as proxied: of those without records the other, which itself is put beside the real one.
fn proxied_of(mode: Mode) -> Mode {
    if mode == Mode::DirectWithoutRecords { Mode::ProxiedWithoutRecords } else { Mode::Proxied }
}

impl Report {
    pub(super) fn json(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    pub(super) fn text(&self) -> String {
        let mut text = self.heading();
        let mut lines =
            vec![["", "MODE", "MEDIAN", "MIN..MAX", "TO NONE", "TO PROXIED", "TO SIDECAR"].map(String::from)];
        let (mut workload, mut name) = ("", "");
        for row in &self.rows {
            if row.figure.workload != workload {
                workload = &row.figure.workload;
                name = "";
                lines.push(std::array::from_fn(|column| if column == 0 { workload.to_owned() } else { String::new() }));
            }
            let shown = if row.figure.name == name {
                String::new()
            } else {
                format!("  {}, {}", row.figure.name, row.figure.unit)
            };
            name = &row.figure.name;
            let compared = |to: Option<Compared>| to.map_or_else(|| "-".into(), Compared::text);
            lines.push([
                shown,
                row.label.clone(),
                number(row.series.median),
                format!("{}..{}", number(row.series.min), number(row.series.max)),
                compared(row.to_none),
                compared(row.to_proxied),
                compared(row.to_sidecar),
            ]);
        }
        text.push_str(&columns(&lines));
        text.push_str(&self.footing());
        text
    }

    pub(super) fn heading(&self) -> String {
        let place = &self.place;
        let mut text = format!(
            "\nkernel {} ({}{}), {} x {}{}\n{} rounds{}{}\n",
            place.kernel,
            place.ktls,
            place.cipher.as_ref().map(|cipher| format!(" with {cipher}")).unwrap_or_default(),
            place.processors,
            place.processor,
            place.qemu.as_ref().map(|qemu| format!(", counting instructions with {qemu}")).unwrap_or_default(),
            self.rounds,
            if place.counted { ", mode by mode" } else { ", interleaved" },
            if self.quick { ", quick" } else { "" },
        );
        for carried in &self.carried {
            let _ = writeln!(text, "{}: {}", carried.mode.label(), carried.ways());
        }
        text.push('\n');
        text
    }

    pub(super) fn footing(&self) -> String {
        let mut text = String::from(
            "\nMedian of the rounds, least and greatest. Ratios are of medians. \"no difference\": the ratio of the medians is no larger than that \
             of the\ngreatest and the least round of either mode; \"?\": fewer than three rounds, so nobody can tell.\n",
        );
        for note in &self.notes {
            let _ = writeln!(text, "Not measured: {note}.");
        }
        if self.place.counted {
            text.push_str(
                "All instructions count alike: these figures tell how much work there is, not how fast it is done.\n",
            );
        }
        if let Some(others) = self.others.as_ref().filter(|_| !self.place.counted) {
            let _ = writeln!(
                text,
                "Of this machine's processors, programs that are not part of it (and interrupts that nobody is charged for) took {:.0} % (median of all\n\
                 measurements; at most {:.0} %).",
                100.0 * others.median,
                100.0 * others.max
            );
            if others.median > NOISY {
                text.push_str(
                    "That is too much: take latencies and throughput for nothing, and processor time with care.\n",
                );
            }
        }
        if let Some(idle) = self.idle.as_ref().filter(|_| self.place.counted) {
            let _ = writeln!(
                text,
                "The guest's processor was idle for {:.1} % (at most {:.1} %).",
                100.0 * idle.median,
                100.0 * idle.max
            );
        }
        text
    }
}

/// Three digits that mean something, none of them lost of larger numbers.
pub(super) fn number(value: f64) -> String {
    let digits = match value.abs() {
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

/// The first two columns flush left, the others right.
fn columns<const N: usize>(lines: &[[String; N]]) -> String {
    // Headings of workloads stand alone on their lines and may be longer than the column.
    let table = || lines.iter().filter(|line| line.iter().skip(1).any(|cell| !cell.is_empty()));
    let width = |column: usize| table().map(|line| line[column].chars().count()).max().unwrap_or_default();
    let widths: [usize; N] = std::array::from_fn(width);
    let mut text = String::new();
    for line in lines {
        let cells = line.iter().zip(widths).enumerate().map(|(column, (cell, width))| {
            if column < 2 { format!("{cell:<width$}  ") } else { format!("{cell:>width$}  ") }
        });
        text.push_str(cells.collect::<String>().trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure() -> Figure {
        Figure { workload: "bulk".into(), name: "CPU".into(), unit: "s/GB".into() }
    }

    fn measured(mode: Mode, values: [f64; 3]) -> Measured {
        Measured { figure: figure(), mode, values: values.to_vec() }
    }

    #[test]
    fn every_mode_is_compared_with_none_and_with_proxied_but_not_with_itself() {
        let rows = rows(vec![
            measured(Mode::None, [1.0, 1.0, 1.1]),
            measured(Mode::Proxied, [4.0, 4.0, 4.1]),
            measured(Mode::Userspace, [4.0, 4.05, 4.1]),
        ]);
        let texts: Vec<[Option<String>; 2]> =
            rows.iter().map(|row| [row.to_none.map(Compared::text), row.to_proxied.map(Compared::text)]).collect();
        let text = |text: &str| Some(text.to_owned());
        assert_eq!(texts[0], [None, text("0.25")]);
        assert_eq!(texts[1], [text("4.00"), None]);
        assert_eq!(texts[2], [text("4.05"), text("no difference")]);
    }

    #[test]
    fn what_does_not_encrypt_is_put_beside_what_does_not_either() {
        let modes = [Mode::Proxied, Mode::ProxiedWithoutRecords, Mode::DirectWithoutRecords];
        let rows =
            rows(modes.into_iter().zip([8.0, 4.0, 1.0]).map(|(mode, value)| measured(mode, [value; 3])).collect());
        let ratios: Vec<Option<f64>> = rows.iter().map(|row| row.to_proxied.map(|compared| compared.ratio)).collect();
        assert_eq!(ratios, [None, Some(0.5), Some(0.25)]);
    }

    #[test]
    fn what_the_base_has_none_of_is_not_divided_by() {
        let rows = rows(vec![measured(Mode::None, [0.0; 3]), measured(Mode::Proxied, [1.0; 3])]);
        assert_eq!(rows[1].to_none, None);
    }

    #[test]
    fn numbers_keep_three_digits() {
        assert_eq!([0.1234, 1.234, 12.34, 123.4, 12345.6].map(number), ["0.123", "1.23", "12.3", "123", "12346"]);
    }
}
