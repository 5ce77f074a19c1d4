import { Fold } from '@/components/Fold';
import { clockTime } from '@/lib/format';
import type { JobEvent } from '@/types/api';
import { useTranslation } from 'react-i18next';
import css from './JobPage.module.css';

/** What a person would want to know first; every step's line is folded away, under the name of such steps. */
export function Events({ events, steps: name }: { events: readonly JobEvent[]; steps: string }) {
  const { i18n } = useTranslation();
  const told = events.filter((event) => event.type !== 'metrics' || event.level !== 'info');
  const steps = events.filter((event) => event.type === 'metrics').slice(-200);
  const line = (event: JobEvent) => (
    <li key={event.id} data-level={event.level}>
      <time dateTime={new Date(event.created_at * 1000).toISOString()}>
        {clockTime(event.created_at, i18n.language)}
      </time>
      <span lang="en">{event.message}</span>
    </li>
  );
  return (
    <>
      <ol className={css.events}>{told.map(line)}</ol>
      {steps.length > 0 ? (
        <Fold title={`${name} (${steps.length})`}>
          <ol className={`${css.events} ${css.steps}`} tabIndex={0} aria-label={name}>
            {steps.map(line).reverse()}
          </ol>
        </Fold>
      ) : null}
    </>
  );
}
