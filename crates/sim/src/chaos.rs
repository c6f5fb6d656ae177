//! What goes wrong, when the dice say so, and that it is mended again.

use std::time::Duration;

use oblak_model::Size;

use crate::chance::Dice;
use crate::cloud::Cloud;
use crate::drivers::Day;
use crate::net::{Cut, Weather};
use crate::node::Machine;
use crate::store::Mood;

/// Room for volumes on a machine's disk when nothing is wrong with it.
const ROOM: Size = Size::gib(100);

/// When something broken is to be mended.
enum Mend {
    Server(usize),
    Pause(usize),
    Agent(usize),
    Link(String),
    Day(usize),
    Store,
    Disk(usize),
}

/// Breaks and mends until dropped.
pub async fn run(cloud: &Cloud) {
    let mut dice = Dice::new(cloud.settings.seed, "chaos");
    let mut mends: Vec<(tokio::time::Instant, Mend)> = Vec::new();
    loop {
        let next = tokio::time::Instant::now() + dice.between(Duration::from_secs(1), Duration::from_secs(40));
        loop {
            mends.sort_by_key(|(at, _)| *at);
            let Some((at, _)) = mends.first().filter(|(at, _)| *at <= next) else { break };
            tokio::time::sleep_until(*at).await;
            let (_, mend) = mends.remove(0);
            self::mend(cloud, mend);
        }
        tokio::time::sleep_until(next).await;
        for mend in strike(cloud, &mut dice).await {
            let within = dice.between(Duration::from_millis(100), Duration::from_secs(50));
            mends.push((next + within, mend));
        }
    }
}

fn mend(cloud: &Cloud, mend: Mend) {
    match mend {
        Mend::Server(n) => cloud.servers[n].start(),
        Mend::Pause(n) => {
            cloud.trace.note("chaos", format_args!("server {} goes on", cloud.servers[n].name()));
            cloud.servers[n].pause.end();
        }
        Mend::Agent(n) => start(cloud, n),
        Mend::Link(who) => {
            cloud.trace.note("chaos", format_args!("the link of {who} is mended"));
            cloud.net.cut(&who, Cut::default());
        }
        Mend::Day(n) => cloud.machines[n].days.set(Day::default()),
        Mend::Store => {
            cloud.trace.note("chaos", "the disk of the store has room again");
            cloud.moods.fill(false);
        }
        Mend::Disk(n) => {
            cloud.trace.note("chaos", format_args!("the disk of {} has room again", cloud.machines[n].name));
            cloud.machines[n].volumes.set_capacity(ROOM);
        }
    }
}

fn start(cloud: &Cloud, n: usize) {
    if let Err(error) = cloud.start_agent(n) {
        cloud.trace.violation(format_args!("an agent does not start: {error}"));
    }
}

async fn strike(cloud: &Cloud, dice: &mut Dice) -> Vec<Mend> {
    let n = victim(cloud, dice);
    let Some(machine) = cloud.machines.get(n) else { return Vec::new() };
    match dice.below(116) {
        0..=14 => {
            machine.kill(&cloud.trace);
            vec![Mend::Agent(n)]
        }
        15..=21 => {
            let n = dice.below(cloud.servers.len());
            cloud.servers[n].kill();
            vec![Mend::Server(n)]
        }
        22..=32 => pause(cloud, dice),
        33..=50 => {
            let cut = match dice.below(3) {
                0 => Cut { up: true, down: true },
                1 => Cut { up: true, down: false },
                _ => Cut { up: false, down: true },
            };
            cloud.trace.note("chaos", format_args!("the link of {} is cut: {cut:?}", machine.name));
            cloud.net.cut(&machine.name, cut);
            vec![Mend::Link(machine.name.clone())]
        }
        51..=66 => {
            weather(cloud, dice);
            Vec::new()
        }
        67..=78 => {
            mood(cloud, dice);
            Vec::new()
        }
        79..=84 => {
            cloud.compact().await;
            Vec::new()
        }
        85..=90 => {
            lose_guest(cloud, machine, dice);
            Vec::new()
        }
        91..=100 => {
            let hangs = if dice.permille(300) { 200 } else { 0 };
            let day = Day { fails: 300, delay: dice.between(Duration::ZERO, Duration::from_secs(30)), hangs };
            cloud.trace.note("chaos", format_args!("{} has a bad day: {day:?}", machine.name));
            machine.days.set(day);
            vec![Mend::Day(n)]
        }
        101..=104 => {
            cloud.trace.note("chaos", "the disk of the store is full");
            cloud.moods.fill(true);
            vec![Mend::Store]
        }
        105..=109 => {
            cloud.trace.note("chaos", format_args!("the disk of {} is full", machine.name));
            machine.volumes.set_capacity(Size::ZERO);
            vec![Mend::Disk(n)]
        }
        _ => {
            machine.reboot(&cloud.trace);
            vec![Mend::Agent(n)]
        }
    }
}

/// Any machine; often one that an instance moves to or from, because that is when most can go wrong.
fn victim(cloud: &Cloud, dice: &mut Dice) -> usize {
    let (any, moving) = (dice.below(cloud.machines.len()), dice.permille(400));
    if !moving {
        return any;
    }
    let ends: Vec<_> = (cloud.checks.mirror().instances.values())
        .filter_map(|i| i.status.migration.as_ref().filter(|m| !m.phase.is_over()))
        .flat_map(|m| [m.from, m.to])
        .collect();
    let end = dice.choose(&ends);
    end.and_then(|end| cloud.machines.iter().position(|m| m.id == *end)).unwrap_or(any)
}

/// A server stands still, or all of them do: then nobody takes over, and the first that goes on may believe that it still leads.
fn pause(cloud: &Cloud, dice: &mut Dice) -> Vec<Mend> {
    let one = dice.below(cloud.servers.len());
    let all = dice.permille(500);
    let paused: Vec<usize> = (0..cloud.servers.len()).filter(|n| all || *n == one).collect();
    for n in &paused {
        cloud.trace.note("chaos", format_args!("server {} is paused", cloud.servers[*n].name()));
        cloud.servers[*n].pause.begin();
    }
    paused.into_iter().map(Mend::Pause).collect()
}

fn lose_guest(cloud: &Cloud, machine: &Machine, dice: &mut Dice) {
    let all: Vec<_> = machine.guests.running().into_iter().collect();
    let Some(guest) = dice.choose(&all).copied() else { return };
    cloud.trace.note("chaos", format_args!("guest {guest} is lost"));
    if dice.permille(500) {
        machine.guests.lose(guest);
    } else {
        machine.guests.exit(guest, 1);
    }
}

fn weather(cloud: &Cloud, dice: &mut Dice) {
    let mut bad = |most: usize| if dice.permille(400) { 0 } else { u32::try_from(dice.below(most)).unwrap_or(0) };
    let (lost_requests, lost_answers, doubled) = (bad(80), bad(80), bad(60));
    let delay = dice.between(Duration::ZERO, Duration::from_secs(4));
    let weather = Weather { lost_requests, lost_answers, doubled, delay };
    cloud.trace.note("chaos", format_args!("{weather:?}"));
    cloud.net.set_weather(weather);
}

fn mood(cloud: &Cloud, dice: &mut Dice) {
    let mut bad = |most: usize| if dice.permille(500) { 0 } else { u32::try_from(dice.below(most)).unwrap_or(0) };
    let (lost_requests, lost_replies) = (bad(60), bad(60));
    let delay = dice.between(Duration::ZERO, Duration::from_millis(500));
    let mood = Mood { lost_requests, lost_replies, delay, ..Mood::default() };
    cloud.trace.note("chaos", format_args!("{mood:?}"));
    cloud.moods.set(mood);
}

/// Mends everything, and nothing new goes wrong.
pub fn heal(cloud: &Cloud) {
    cloud.trace.note("chaos", "everything is mended");
    cloud.net.heal();
    cloud.moods.set(Mood::default());
    for (n, machine) in cloud.machines.iter().enumerate() {
        machine.days.set(Day::default());
        machine.volumes.set_capacity(ROOM);
        start(cloud, n);
    }
    for server in &cloud.servers {
        server.pause.end();
        server.start();
    }
}
