//! How `marline top` looks, and what its keys do.

use ratatui::{
    Frame,
    crossterm::event::KeyCode,
    layout::{Constraint, Layout},
    style::{Color, Modifier, Style},
    text::{Line, Span},
    widgets::{Cell, Paragraph, Row as Line_, Table},
};

use super::{
    super::{
        connections::mode_paint,
        table::{self, Colour, Paint, bytes, plain},
    },
    model::{Grouping, Model, Row, Sort},
};

const HEADER: [&str; 10] =
    ["DIR", "SOURCE", "DESTINATION", "MODE", "PATH", "CONNS", "SENT/s", "RECEIVED/s", "SENT", "RECEIVED"];
const KEYS: &str = "q quit  p pause  s sort  r reverse  v view  / filter  arrows scroll";

pub(super) struct Screen {
    pub(super) paused: bool,
    pub(super) trouble: Option<String>,
    sort: Sort,
    reverse: bool,
    filter: String,
    /// Whether keys are letters of the filter.
    typing: bool,
    top: usize,
    page: usize,
    colour: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Typed {
    Quit,
    Nothing,
}

impl Screen {
    pub(super) fn new(sort: Sort, colour: Colour) -> Self {
        let filter = String::new();
        let colour = colour.is_on();
        Self { paused: false, trouble: None, sort, reverse: false, filter, typing: false, top: 0, page: 1, colour }
    }

    pub(super) fn key(&mut self, key: KeyCode, model: &mut Model) -> Typed {
        match (self.typing, key) {
            (true, KeyCode::Enter) => self.typing = false,
            (true, KeyCode::Esc) => (self.typing, self.filter) = (false, String::new()),
            (true, KeyCode::Backspace) => drop(self.filter.pop()),
            (true, KeyCode::Char(letter)) => self.filter.push(letter),
            (false, KeyCode::Char('q')) => return Typed::Quit,
            (false, KeyCode::Char('p' | ' ')) => {
                self.paused = !self.paused;
                if !self.paused {
                    model.show();
                }
            }
            (false, KeyCode::Char('s')) => self.sort = self.sort.next(),
            (false, KeyCode::Char('r')) => self.reverse = !self.reverse,
            (false, KeyCode::Char('v')) => model.regroup(),
            (false, KeyCode::Char('/')) => (self.typing, self.filter, self.top) = (true, String::new(), 0),
            (false, KeyCode::Esc) => self.filter.clear(),
            (_, KeyCode::Down) => self.top = self.top.saturating_add(1),
            (_, KeyCode::Up) => self.top = self.top.saturating_sub(1),
            (_, KeyCode::PageDown) => self.top = self.top.saturating_add(self.page),
            (_, KeyCode::PageUp) => self.top = self.top.saturating_sub(self.page),
            (_, KeyCode::Home) => self.top = 0,
            _ => {}
        }
        Typed::Nothing
    }

    pub(super) fn draw(&mut self, frame: &mut Frame<'_>, model: &Model) {
        let [head, body, foot] =
            Layout::vertical([Constraint::Length(2), Constraint::Min(1), Constraint::Length(1)]).areas(frame.area());
        let rows = model.rows(self.sort, self.reverse, &self.filter);
        self.page = usize::from(body.height.saturating_sub(1)).max(1);
        self.top = self.top.min(rows.len().saturating_sub(1));
        frame.render_widget(Paragraph::new(self.headline(&rows, model)), head);
        let lines = rows.iter().skip(self.top).take(self.page).map(|row| self.line(row));
        let widths = [
            Constraint::Length(3),
            Constraint::Fill(2),
            Constraint::Fill(3),
            Constraint::Length(9),
            Constraint::Length(7),
            Constraint::Length(5),
            Constraint::Length(12),
            Constraint::Length(12),
            Constraint::Length(10),
            Constraint::Length(10),
        ];
        let header = Line_::new(HEADER).style(Style::new().add_modifier(Modifier::REVERSED));
        frame.render_widget(Table::new(lines, widths).header(header), body);
        let foot_text = match self.typing {
            true => format!("filter: {}_", self.filter),
            false => KEYS.to_owned(),
        };
        frame.render_widget(Paragraph::new(foot_text), foot);
    }

    fn headline(&self, rows: &[Row], model: &Model) -> Vec<Line<'static>> {
        let live: u64 = rows.iter().map(|row| row.connections).sum();
        let rate: f64 = rows.iter().map(|row| row.sent_rate + row.received_rate).sum();
        let covered = model
            .coverage()
            .map_or_else(|| "no bytes yet".to_owned(), |share| format!("{:.1}% of bytes mTLS", share * 100.0));
        let what = if model.by() == Grouping::Flow { "flows" } else { "workloads" };
        let order = if self.reverse { ", reversed" } else { "" };
        let mut state = format!("{} {what}, sorted by {}{order}", rows.len(), self.sort.name());
        if !self.filter.is_empty() {
            state.push_str(&format!(", filter {:?}", self.filter));
        }
        let mut second = vec![Span::raw(state)];
        if self.paused {
            second.push(Span::styled("  PAUSED", Style::new().add_modifier(Modifier::BOLD)));
        }
        if let Some(trouble) = &self.trouble {
            second.push(Span::styled(format!("  {}", plain(trouble)), self.style(Paint::Bad)));
        }
        let first = format!("marline top: {live} connections, {}/s, {covered}", bytes(rate as u64));
        vec![Line::raw(first), Line::from(second)]
    }

    fn line(&self, row: &Row) -> Line_<'static> {
        let mode = Cell::from(Span::styled(plain(&row.mode), self.style(mode_paint(&row.mode))));
        let mut cells: Vec<Cell<'static>> = told(row).map(Cell::from).into();
        if let Some(place) = cells.get_mut(3) {
            *place = mode;
        }
        Line_::new(cells)
    }

    fn style(&self, paint: Paint) -> Style {
        match paint {
            _ if !self.colour => Style::new(),
            Paint::Good => Style::new().fg(Color::Green),
            Paint::Warning => Style::new().fg(Color::Yellow),
            Paint::Bad => Style::new().fg(Color::Red),
            Paint::Faint => Style::new().add_modifier(Modifier::DIM),
            Paint::Plain => Style::new(),
        }
    }
}

/// The same for scripts.
pub(super) fn printed(rows: &[Row], model: &Model, colour: Colour) -> String {
    let line = |row: &Row| -> Vec<table::Cell> {
        let mut cells: Vec<table::Cell> = told(row).iter().map(table::Cell::from).collect();
        if let Some(mode) = cells.get_mut(3) {
            mode.paint = mode_paint(&row.mode);
        }
        cells
    };
    let rows: Vec<_> = rows.iter().map(line).collect();
    let covered = model
        .coverage()
        .map_or_else(|| "no bytes were seen".to_owned(), |share| format!("{:.1}% of bytes under mTLS", share * 100.0));
    format!("{}{} rows, {covered}\n", table::table(&HEADER, &rows, colour), rows.len())
}

fn told(row: &Row) -> [String; 10] {
    [
        plain(&row.direction),
        plain(&row.source),
        plain(&row.destination),
        plain(&row.mode),
        plain(&row.path),
        row.connections.to_string(),
        bytes(row.sent_rate as u64),
        bytes(row.received_rate as u64),
        bytes(row.sent),
        bytes(row.received),
    ]
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use ratatui::{Terminal, backend::TestBackend};

    use super::{super::model::tests::one, *};

    fn drawn(screen: &mut Screen, model: &Model, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| screen.draw(frame, model)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        buffer
            .content
            .chunks(usize::from(width))
            .map(|line| line.iter().map(|cell| cell.symbol()).collect::<String>() + "\n")
            .collect()
    }

    #[test]
    fn keys_pause_sort_filter_and_quit() {
        let mut model = Model::new(Grouping::Flow);
        model.take(Instant::now(), &[one(1, 10, 1)], &[], true);
        let mut screen = Screen::new(Sort::Rate, Colour::OFF);
        let text = drawn(&mut screen, &model, 140, 12);
        assert!(
            text.contains("demo/client") && text.contains("demo/server:80") && text.contains("sorted by rate"),
            "{text}"
        );
        assert!(text.contains("100.0% of bytes mTLS") && text.contains("q quit"), "{text}");
        for key in ['p', 's', 'v', '/', 'z', 'z'] {
            assert_eq!(screen.key(KeyCode::Char(key), &mut model), Typed::Nothing);
        }
        let text = drawn(&mut screen, &model, 140, 12);
        assert!(text.contains("0 workloads, sorted by total, filter \"zz\"") && text.contains("PAUSED"), "{text}");
        assert!(text.contains("filter: zz_"), "{text}");
        assert_eq!(screen.key(KeyCode::Char('q'), &mut model), Typed::Nothing, "a letter of the filter");
        screen.key(KeyCode::Esc, &mut model);
        assert_eq!(screen.key(KeyCode::Char('q'), &mut model), Typed::Quit);
    }

    #[test]
    fn no_size_of_terminal_and_no_scrolling_is_a_panic() {
        let mut model = Model::new(Grouping::Flow);
        model.take(Instant::now(), &[one(1, 10, 1)], &[], true);
        let mut screen = Screen::new(Sort::Name, Colour::OFF);
        for (width, height) in [(1, 1), (3, 2), (80, 3), (300, 100)] {
            for key in [KeyCode::PageDown, KeyCode::Down, KeyCode::Down, KeyCode::PageUp, KeyCode::Up, KeyCode::Home] {
                screen.key(key, &mut model);
                drawn(&mut screen, &model, width, height);
            }
        }
    }
}
