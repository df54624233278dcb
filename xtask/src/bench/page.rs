//! The report as a page that can be put in front of anybody: one file without anything from elsewhere. Plots are `page/plot.rs`; what differs
//! and what does not is decided in `stats.rs`, as for the table.

mod plot;

use std::{collections::BTreeSet, fmt::Write as _};

use anyhow::Result;
use clap::ValueEnum;

use super::{
    bed::Mode,
    report::{Report, Row, number},
    stats::Compared,
};

const STYLE: &str = "\
body{font:15px/1.45 system-ui,sans-serif;color:#1a1a1a;max-width:1160px;margin:2em auto;padding:0 1em}\
h1{margin-bottom:.2em}h2{margin-top:2.2em;border-top:1px solid #ccc;padding-top:1em}\
table{border-collapse:collapse;width:100%;font-size:13px}\
th,td{padding:.25em .6em;border-bottom:1px solid #e4e4e4;text-align:right;white-space:nowrap}\
th:first-child,td:first-child,th:nth-child(2),td:nth-child(2){text-align:left}\
th{background:#f4f4f4}dt{font-weight:600;margin-top:.5em}dd{margin-left:1.5em}\
.plain{background:#fff1e0}.warn{background:#fff1e0;border-left:4px solid #d9730d;padding:.6em 1em}\
.quiet{color:#666}svg{max-width:100%;height:auto}";

/// The whole page.
pub(super) fn page(report: &Report) -> Result<String> {
    let mut html = String::new();
    let _ = write!(
        html,
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width\">\n<title>What the mesh costs</title><style>{STYLE}</style></head><body>\n\
         <h1>What the mesh costs</h1>\n"
    );
    heading(&mut html, report);
    for rows in report.rows.chunk_by(|one, next| one.figure.workload == next.figure.workload) {
        let Some(first) = rows.first() else { continue };
        let _ = writeln!(html, "<h2>{}</h2>", escape(&first.figure.workload));
        html.push_str(&plot::plot(rows)?);
        table(&mut html, rows);
    }
    html.push_str("</body></html>\n");
    Ok(html)
}

fn heading(html: &mut String, report: &Report) {
    for line in report.heading().lines().filter(|line| !line.is_empty()).take(2) {
        let _ = writeln!(html, "<p>{}</p>", escape(line));
    }
    let modes: BTreeSet<Mode> = report.rows.iter().map(|row| row.mode).collect();
    if modes.iter().any(|mode| mode.without_records()) {
        html.push_str(
            "<p class=\"warn\">What is called WITHOUT RECORDS encrypts NOTHING after the handshake. It shows what the mechanism costs on \
             a kernel that has no TLS, and is no way to run a mesh.</p>\n",
        );
    }
    html.push_str("<dl>\n");
    for mode in modes {
        let what = mode.to_possible_value().and_then(|value| Some(value.get_help()?.to_string()));
        let what = what.unwrap_or_else(|| "No agent; the proxy that --external named".to_owned());
        let ways = report.carried.iter().find(|carried| carried.mode == mode).map(|carried| carried.ways());
        let _ = writeln!(
            html,
            "<dt>{}</dt><dd>{}.<br><span class=\"quiet\">Connections: {}</span></dd>",
            escape(mode.label()),
            escape(&what),
            escape(&ways.unwrap_or_default())
        );
    }
    html.push_str("</dl>\n");
    let footing: Vec<String> = report.footing().split_whitespace().map(escape).collect();
    let _ = writeln!(html, "<p class=\"quiet\">{}</p>", footing.join(" "));
    html.push_str("<p class=\"quiet\">In plots: bars are medians, whiskers the least and the greatest round.</p>\n");
}

fn table(html: &mut String, rows: &[Row]) {
    html.push_str(
        "<table><tr><th>figure</th><th>mode</th><th>median</th><th>min..max</th><th>to none</th><th>to proxied</th>\
         <th>to sidecar</th></tr>\n",
    );
    let mut name = "";
    for row in rows {
        let shown =
            if row.figure.name == name { String::new() } else { format!("{}, {}", row.figure.name, row.figure.unit) };
        name = &row.figure.name;
        let compared = |to: Option<Compared>| to.map_or_else(|| "-".into(), Compared::text);
        let class = if row.mode.without_records() { " class=\"plain\"" } else { "" };
        let _ = writeln!(
            html,
            "<tr{class}><td>{}</td><td>{}</td><td>{}</td><td>{}..{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            escape(&shown),
            escape(&row.label),
            number(row.series.median),
            number(row.series.min),
            number(row.series.max),
            compared(row.to_none),
            compared(row.to_proxied),
            compared(row.to_sidecar),
        );
    }
    html.push_str("</table>\n");
}

/// As text of HTML, in elements and in attributes.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{place::Place, plan::Figure, report};

    fn made_up(values: &[(&str, Mode, &[f64])]) -> Report {
        let measured = values.iter().map(|(workload, mode, values)| report::Measured {
            figure: Figure { workload: (*workload).into(), name: "p50".into(), unit: "us".into() },
            mode: *mode,
            values: values.to_vec(),
        });
        Report {
            place: Place {
                kernel: "6.99".into(),
                ktls: "kernel TLS: no".into(),
                cipher: None,
                processor: "CPU <b>&\"x\"</b>".into(),
                processors: 2,
                counted: false,
                qemu: None,
            },
            rounds: 3,
            quick: true,
            carried: Vec::new(),
            notes: vec!["system calls: <none> counted".into()],
            others: None,
            idle: None,
            rows: report::rows(measured.collect()),
        }
    }

    #[test]
    fn a_page_has_a_plot_with_labels_and_whiskers_for_each_workload() {
        let values: [(&str, Mode, &[f64]); 4] = [
            ("new <connection>", Mode::None, &[1.0, 1.1, 1.2]),
            ("new <connection>", Mode::Proxied, &[4.0, 4.1, 4.2]),
            ("other", Mode::None, &[1.0, 1.0, 1.1]),
            ("other", Mode::Proxied, &[1.0, 1.05, 1.1]),
        ];
        let page = page(&made_up(&values)).unwrap();
        assert_eq!((page.matches("<svg").count(), page.matches("</svg>").count()), (2, 2));
        // The middle of each whisker.
        assert_eq!(page.matches("<circle").count(), 4, "{page}");
        for part in ["proxied 4.10", "p50, us", "new &lt;connection&gt;", "kernel 6.99", "&lt;none&gt; counted"] {
            assert!(page.contains(part), "{part:?} is missing from {page}");
        }
    }

    #[test]
    fn what_is_no_difference_is_called_none_in_plot_and_table() {
        let values: [(&str, Mode, &[f64]); 2] =
            [("w", Mode::None, &[1.0, 1.0, 1.1]), ("w", Mode::Proxied, &[1.0, 1.05, 1.1])];
        let page = page(&made_up(&values)).unwrap();
        assert!(page.contains("<td>no difference</td>"), "{page}");
        assert!(page.contains("no difference from none") && !page.contains("1.05 x none"), "{page}");
    }

    #[test]
    fn what_does_not_encrypt_is_called_so_wherever_it_stands() {
        let page = page(&made_up(&[("w", Mode::DirectWithoutRecords, &[1.0, 1.0, 1.1])])).unwrap();
        assert!(page.contains("encrypts NOTHING"));
        assert!(page.contains("<td>direct WITHOUT RECORDS</td>") && page.contains("direct WITHOUT RECORDS 1.00"));
        assert!(page.contains("<tr class=\"plain\">"));
    }

    #[test]
    fn a_page_takes_nothing_from_elsewhere_and_nothing_for_markup() {
        let page = page(&made_up(&[("w", Mode::None, &[1.0])])).unwrap();
        assert!(page.contains("CPU &lt;b&gt;&amp;&quot;x&quot;&lt;/b&gt;"), "{page}");
        for foreign in ["<script", "<link", "src=", "href=", "url("] {
            assert!(!page.contains(foreign), "{foreign}");
        }
    }
}
