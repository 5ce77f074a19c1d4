/** The same keys with other words: what a translation must be. */
export type Words<T> = { [K in keyof T]: T[K] extends string ? string : Words<T[K]> };
