import css from './Status.module.css';

export type Tone = 'busy' | 'good' | 'bad' | 'waiting' | 'none';

/** In one or two words how something stands; the colour says no more than they do. */
export function Status({ tone, children }: { tone: Tone; children: string }) {
  return (
    <span className={css.badge} data-tone={tone}>
      <span className={css.dot} aria-hidden="true" />
      {children}
    </span>
  );
}
