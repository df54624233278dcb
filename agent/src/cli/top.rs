//! `marline top`: the flows through a running agent, live. `model` adds up, `screen` draws, and this file has the terminal and the keys.

mod model;
mod screen;

use std::{
    io::IsTerminal as _,
    process::ExitCode,
    sync::mpsc::{Receiver, Sender, channel},
    time::{Duration, Instant},
};

use clap::Args;
use ratatui::{
    DefaultTerminal,
    crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers},
};

use super::{
    client::{AdminArgs, Client},
    connections::{
        Filter,
        model::{Connection, Fetched},
    },
    finish,
    table::Colour,
};
use model::{Grouping, Model, Sort};
use screen::{Screen, Typed};

#[derive(Args)]
#[command(after_long_help = "\
Keys: q quits, p pauses, s changes what is sorted by, r reverses, v changes between flows and workloads, / takes a filter (Enter ends it,
Esc clears it), the arrows and Page keys scroll. A flow is all connections from one workload to one port of another, in one direction
and mode. Totals count from the start of this command, and of connections that live from their beginning.

--once prints what the second look shows, for scripts; --count so many looks. Exit codes: 0 ended well, 1 standard output is no
terminal, 2 no agent answers.

  marline top
  marline top -n shop --sort total
  marline top --once --json | jq '.rows[] | select(.mode == \"plaintext\")'")]
pub(super) struct TopArgs {
    #[command(flatten)]
    admin: AdminArgs,
    #[command(flatten)]
    filter: Filter,
    /// Print once and end
    #[arg(long)]
    once: bool,
    /// Print so many times and end
    #[arg(short, long, value_name = "N", conflicts_with = "once")]
    count: Option<u32>,
    /// Between two looks
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = humantime::parse_duration)]
    interval: Duration,
    /// What to sort by
    #[arg(long, value_enum, default_value_t)]
    sort: Sort,
    /// What to add up by
    #[arg(long, value_enum, default_value_t)]
    by: Grouping,
}

/// What the terminal's loop waits for.
enum Message {
    Input(Event),
    Look(Instant, Vec<Connection>, Vec<Connection>),
    /// The agent does not answer.
    Silence(String),
    /// A signal.
    Quit,
}

pub(super) fn run(args: &TopArgs) -> ExitCode {
    if let Some(count) = args.once.then_some(1).or(args.count) {
        return finish(batch(args, count).map(|()| (String::new(), true)));
    }
    if args.admin.json {
        eprintln!("marline top: --json is for --once or --count");
        return ExitCode::from(super::WRONG_CONFIGURATION);
    }
    if !std::io::stdout().is_terminal() || !std::io::stdin().is_terminal() {
        return super::failed("top needs a terminal; for scripts and pipes there is `marline top --once`");
    }
    // An agent that is not there is told before the screen is taken.
    let first = Client::new(args.admin.admin).and_then(|client| Fetched::live(&client));
    if let Err(error) = first {
        return finish(Err(error.to_string()));
    }
    // `init` also puts the terminal back if something panics.
    let mut terminal = ratatui::init();
    let outcome = follow(args, &mut terminal);
    ratatui::restore();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => super::failed(&format!("the terminal: {error}")),
    }
}

fn follow(args: &TopArgs, terminal: &mut DefaultTerminal) -> std::io::Result<()> {
    let (sender, messages) = channel();
    look_ever_again(args, sender.clone());
    hear_signals(sender.clone())?;
    std::thread::spawn(move || {
        while let Ok(event) = event::read() {
            if sender.send(Message::Input(event)).is_err() {
                return;
            }
        }
    });
    let mut model = Model::new(args.by);
    let mut screen = Screen::new(args.sort, Colour::of_stdout());
    watch(args, terminal, &messages, &mut model, &mut screen)
}

fn watch(
    args: &TopArgs,
    terminal: &mut DefaultTerminal,
    messages: &Receiver<Message>,
    model: &mut Model,
    screen: &mut Screen,
) -> std::io::Result<()> {
    loop {
        terminal.draw(|frame| screen.draw(frame, model))?;
        let Ok(message) = messages.recv() else { return Ok(()) };
        match message {
            Message::Quit => return Ok(()),
            Message::Silence(what) => screen.trouble = Some(what),
            Message::Look(at, mut live, mut ended) => {
                screen.trouble = None;
                live.retain(|one| args.filter.lets(one));
                ended.retain(|one| args.filter.lets(one));
                // Counted also in a pause: only what is shown stands still.
                model.take(at, &live, &ended, !screen.paused);
            }
            Message::Input(Event::Key(key)) if key.kind != KeyEventKind::Release => {
                let interrupt = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
                if interrupt || screen.key(key.code, model) == Typed::Quit {
                    return Ok(());
                }
            }
            // A new size: drawn anew.
            Message::Input(_) => {}
        }
    }
}

/// The agent may take its time: keys are heard meanwhile.
fn look_ever_again(args: &TopArgs, sender: Sender<Message>) {
    let (address, interval) = (args.admin.admin, args.interval);
    std::thread::spawn(move || {
        loop {
            let look = Client::new(address).and_then(|client| {
                // In this order none is missed.
                let live = Fetched::live(&client)?;
                Ok((Instant::now(), live, Fetched::ended(&client)?))
            });
            let message = match look {
                Ok((at, live, ended)) => Message::Look(at, live, ended),
                Err(error) => Message::Silence(error.to_string()),
            };
            if sender.send(message).is_err() {
                return;
            }
            std::thread::sleep(interval);
        }
    });
}

/// Whoever ends this from outside gets the terminal back as it was.
fn hear_signals(sender: Sender<Message>) -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut terminate, mut hangup) = {
        let _inside = runtime.enter();
        (signal(SignalKind::terminate())?, signal(SignalKind::hangup())?)
    };
    std::thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
            }
        });
        let _ = sender.send(Message::Quit);
    });
    Ok(())
}

fn batch(args: &TopArgs, count: u32) -> Result<(), String> {
    let client = Client::new(args.admin.admin).map_err(|error| error.to_string())?;
    let mut model = Model::new(args.by);
    for number in 0..=count {
        let mut live = Fetched::live(&client).map_err(|error| error.to_string())?;
        let at = Instant::now();
        let mut ended = Fetched::ended(&client).map_err(|error| error.to_string())?;
        live.retain(|one| args.filter.lets(one));
        ended.retain(|one| args.filter.lets(one));
        model.take(at, &live, &ended, true);
        // Rates are known from the second look on.
        if number > 0 {
            let rows = model.rows(args.sort, false, "");
            super::print(&match args.admin.json {
                true => format!("{}\n", serde_json::json!({ "coverage": model.coverage(), "rows": rows })),
                false => screen::printed(&rows, &model, Colour::of_stdout()),
            });
        }
        if number < count {
            std::thread::sleep(args.interval);
        }
    }
    Ok(())
}
