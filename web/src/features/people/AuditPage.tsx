import { Empty } from '@/components/Empty';
import { ErrorNote } from '@/components/ErrorNote';
import { dateTime } from '@/lib/format';
import type { AuditEntry } from '@/types/api';
import { Button, Select, Skeleton } from '@mantine/core';
import { useInfiniteQuery, useQuery } from '@tanstack/react-query';
import { useTranslation } from 'react-i18next';
import { useSearchParams } from 'react-router';
import { AdminPage } from './AdminPage';
import css from './AuditPage.module.css';
import { auditQuery, peopleQuery } from './queries';

const ACTIONS = [
  'session.open',
  'session.refused',
  'key.create',
  'key.revoke',
  'password.set',
  'enrol_token.create',
  'enrol_token.revoke',
  'user.create',
  'user.disable',
  'user.enable',
  'user.delete',
  'user.deleted',
  'webhook.create',
  'webhook.delete',
  'gpu.drain',
  'gpu.undrain',
] as const;
const NO_PERSONS = ['command line', 'relay', 'unknown']; // who else an entry may name

/** The filter is in the address, so that what was found can be shown to somebody. */
export function AuditPage() {
  const { t } = useTranslation();
  const [query, setQuery] = useSearchParams();
  const filter = { who: query.get('who'), action: query.get('action') };
  const log = useInfiniteQuery(auditQuery(filter));
  const people = useQuery(peopleQuery);
  const entries = log.data?.pages.flatMap((page) => page.data) ?? [];
  const choose = (name: string, value: string | null) =>
    setQuery(
      (before) => {
        if (value) before.set(name, value);
        else before.delete(name);
        return before;
      },
      { replace: true },
    );
  const names = [...(people.data?.map((each) => each.name) ?? []), ...NO_PERSONS];
  if (filter.who && !names.includes(filter.who)) names.push(filter.who); // deleted since
  return (
    <AdminPage title={t('people.audit')} lead={t('people.auditLead')}>
      <div className={css.filter}>
        <Select
          label={t('people.who')}
          placeholder={t('people.anybody')}
          value={filter.who}
          onChange={(who) => choose('who', who)}
          data={names}
          clearable
          searchable
        />
        <Select
          label={t('people.action')}
          placeholder={t('people.anything')}
          value={filter.action}
          onChange={(action) => choose('action', action)}
          data={ACTIONS.map((action) => ({ value: action, label: t(did(action)) }))}
          clearable
        />
      </div>
      {log.isError ? <ErrorNote error={log.error} retry={() => void log.refetch()} /> : null}
      {log.isPending ? <Skeleton height={160} radius="md" /> : null}
      {log.isSuccess && entries.length === 0 ? (
        <Empty title={t('people.auditNone')} text={t('people.auditNoneText')} />
      ) : null}
      {entries.length > 0 ? <Entries entries={entries} /> : null}
      {log.hasNextPage ? (
        <Button variant="subtle" mt="md" loading={log.isFetchingNextPage} onClick={() => void log.fetchNextPage()}>
          {t('people.older')}
        </Button>
      ) : null}
    </AdminPage>
  );
}

function Entries({ entries }: { entries: readonly AuditEntry[] }) {
  const { t, i18n } = useTranslation();
  const done = (action: string) => (i18n.exists(did(action)) ? t(did(action)) : action);
  return (
    <div className={css.frame}>
      <table className={css.table}>
        <thead>
          <tr>
            <th scope="col">{t('people.at')}</th>
            <th scope="col">{t('people.who')}</th>
            <th scope="col">{t('people.action')}</th>
            <th scope="col">{t('people.target')}</th>
            <th scope="col">{t('people.address')}</th>
          </tr>
        </thead>
        <tbody>
          {entries.map((entry) => (
            <tr key={entry.id}>
              <td>
                <time dateTime={new Date(entry.at * 1000).toISOString()}>{dateTime(entry.at, i18n.language)}</time>
              </td>
              <td>{entry.who}</td>
              <td className={entry.action === 'session.refused' ? css.refused : undefined}>{done(entry.action)}</td>
              <td>{entry.target}</td>
              <td className={css.pale}>{entry.address}</td>
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

const did = (action: string) => `people.did_${action.replace('.', '_')}` as 'people.did_session_open';
