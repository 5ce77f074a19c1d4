import { ErrorNote } from '@/components/ErrorNote';
import { Row, Rows } from '@/components/Rows';
import { duration, until } from '@/lib/format';
import type { KeyUsage } from '@/types/api';
import { Badge, Skeleton, Text } from '@mantine/core';
import { useQuery } from '@tanstack/react-query';
import { useTranslation } from 'react-i18next';
import { usageQuery } from './queries';
import css from './Usage.module.css';

/** Tokens, time and money of this calendar month, and which key took how much of its share. */
export function Usage() {
  const { t, i18n } = useTranslation();
  const usage = useQuery(usageQuery);
  if (usage.isError) return <ErrorNote error={usage.error} retry={() => void usage.refetch()} />;
  if (!usage.data) return <Skeleton height={80} radius="md" />;
  const { tokens, prompt_tokens, completion_tokens, trained_tokens, gpu_s, spend, prices, ends_at, keys } = usage.data;
  const priced = prices.per_million_tokens > 0 || prices.per_gpu_hour > 0;
  const number = (value: number) => value.toLocaleString(i18n.language);
  const parts = [
    [t('usage.prompt'), prompt_tokens],
    [t('usage.completion'), completion_tokens],
    [t('usage.trained'), trained_tokens],
  ] as const;
  return (
    <>
      <dl className={css.facts}>
        <div>
          <dt>{t('usage.tokens')}</dt>
          <dd>{number(tokens)}</dd>
          <dd className={css.parts}>{parts.map(([name, value]) => `${name} ${number(value)}`).join(' · ')}</dd>
        </div>
        <div>
          <dt>{t('usage.gpu')}</dt>
          <dd>{duration(gpu_s, i18n.language)}</dd>
        </div>
        {priced ? (
          <div>
            <dt>{t('usage.spend')}</dt>
            <dd>{money(spend, i18n.language)}</dd>
          </div>
        ) : null}
      </dl>
      {keys.length > 0 ? (
        <Rows label={t('usage.byKey')}>
          {keys.map((key) => (
            <KeyRow key={key.id} used={key} priced={priced} />
          ))}
        </Rows>
      ) : null}
      <Text size="xs" c="dimmed">
        {t('usage.until', { when: until(ends_at, i18n.language) })}
      </Text>
    </>
  );
}

function KeyRow({ used, priced }: { used: KeyUsage; priced: boolean }) {
  const { t, i18n } = useTranslation();
  const { tokens, spend, tokens_per_month: mostTokens, spend_per_month: mostSpend } = used;
  const full = (mostTokens !== null && tokens >= mostTokens) || (mostSpend !== null && spend >= mostSpend);
  const number = (value: number) => value.toLocaleString(i18n.language);
  const amount = (value: number) => money(value, i18n.language);
  return (
    <Row
      name={used.name ?? (used.prefix === 'password' ? t('keys.ofPassword') : `${used.prefix}…`)}
      marks={
        full || used.revoked ? (
          <Badge size="sm" variant="light" color={full ? 'red' : 'gray'}>
            {t(full ? 'usage.full' : 'usage.revoked')}
          </Badge>
        ) : null
      }
      facts={[
        mostTokens === null
          ? t('usage.tokensOnly', { used: number(tokens) })
          : t('usage.ofTokens', { used: number(tokens), limit: number(mostTokens) }),
        used.gpu_s > 0 ? duration(used.gpu_s, i18n.language) : null,
        mostSpend !== null
          ? t('usage.ofSpend', { used: amount(spend), limit: amount(mostSpend) })
          : priced
            ? t('usage.spendOnly', { used: amount(spend) })
            : null,
      ]}
    />
  );
}

/** Of no currency: the relay's prices name none. */
const money = (value: number, language: string): string => value.toLocaleString(language, { maximumFractionDigits: 4 });
