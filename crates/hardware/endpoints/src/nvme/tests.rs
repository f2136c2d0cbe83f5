mod admin;
mod driver;
mod faults;
mod fuzz;
mod io;
mod queues;
mod registers;
mod threads;
