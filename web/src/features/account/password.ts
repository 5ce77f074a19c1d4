export const PASSWORD_CHARS = 10; // at least; the relay holds to it
