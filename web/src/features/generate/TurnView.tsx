import { Dialog } from '@/components/Dialog';
import { ErrorNote } from '@/components/ErrorNote';
import { Icon } from '@/components/Icon';
import { Markdown } from '@/components/Markdown';
import { ApiError } from '@/lib/api';
import { Button, CopyButton, Text } from '@mantine/core';
import { useDisclosure } from '@mantine/hooks';
import { memo, type ReactNode } from 'react';
import { useTranslation } from 'react-i18next';
import { Link } from 'react-router';
import { isOver, type Turn } from './conversation';
import { DIALS, format, turnedBands } from './dials';
import { KeepAnswer } from './KeepAnswer';
import { shortName } from './ModelPicker';
import { Pictures } from './Pictures';
import css from './TurnView.module.css';

interface Props {
  turn: Turn;
  onRetry?: (() => void) | undefined; // of the last turn
}

export const TurnView = memo(function TurnView({ turn, onRetry }: Props) {
  const { t } = useTranslation();
  const { phase, ask } = turn;
  const over = isOver(phase);
  const [keeping, modal] = useDisclosure(false);
  const name = shortName({ id: ask.model, parent: ask.model.startsWith('ft:') ? ask.model : null });
  const turned = DIALS.filter((dial) => ask.dials[dial] !== 1);
  const drawn = ask.kind === 'image';
  return (
    <article className={css.turn}>
      <div className={css.question}>
        <span className={css.hidden}>{t('generate.you')}: </span>
        {turn.question}
      </div>
      <div className={css.answer} aria-busy={!over}>
        <div className={css.by}>
          <span className={css.model}>{name}</span>
          {turned.map((dial) => (
            <span key={dial} className={css.chip}>
              {t(`dials.${dial}`)} {format(dial, ask.dials[dial])}
            </span>
          ))}
          {turnedBands(ask.bands ?? []).map((band) => (
            <span key={band.layers} className={css.chip}>
              {band.layers}{' '}
              {DIALS.filter((dial) => band[dial] !== 1)
                .map((dial) => `${t(`dials.${dial}`)} ${format(dial, band[dial])}`)
                .join(' ')}
            </span>
          ))}
        </div>
        {turn.answer ? <Markdown text={turn.answer} /> : null}
        {turn.pictures?.length ? <Pictures turn={turn} /> : null}
        {phase.is === 'done' && !turn.answer ? (
          drawn ? (
            turn.pictures?.length ? null : (
              <Text c="dimmed">{t('pictures.gone')}</Text>
            )
          ) : (
            <Text c="dimmed">{t('generate.empty')}</Text>
          )
        ) : null}
        {phase.is === 'failed' ? (
          <ErrorNote error={new ApiError(phase.error.message, phase.error.status, phase.error.code)} retry={onRetry} />
        ) : null}
        {over ? null : <State turn={turn} />}
        {over && phase.is !== 'failed' ? (
          <div className={css.actions}>
            {drawn ? null : (
              <CopyButton value={turn.answer}>
                {({ copied, copy }) => (
                  <Small icon={copied ? 'check' : 'copy'} onClick={copy} disabled={!turn.answer}>
                    {copied ? t('app.copied') : t('app.copy')}
                  </Small>
                )}
              </CopyButton>
            )}
            {turn.answer ? (
              <Small icon="edit" onClick={modal.open}>
                {t('data.edit')}
              </Small>
            ) : null}
            {onRetry ? (
              <Small icon="retry" onClick={onRetry} title={t('generate.retryDials')}>
                {t('generate.retry')}
              </Small>
            ) : null}
            <span className={css.facts}>
              {[
                phase.is === 'stopped'
                  ? t('generate.stopped')
                  : phase.is === 'done' && phase.reason === 'length'
                    ? t('generate.cutByLength')
                    : null,
                turn.tokens > 0 ? t('generate.tokens', { count: turn.tokens }) : null,
                rate(turn) ? t('generate.rate', { rate: rate(turn) }) : null,
              ]
                .filter(Boolean)
                .join(' · ')}
            </span>
          </div>
        ) : null}
      </div>
      <Dialog opened={keeping} onClose={modal.close} title={t('data.editTitle')}>
        <KeepAnswer turn={turn} onDone={modal.close} />
      </Dialog>
    </article>
  );
});

/** What is happening, in words; never a bare spinner. */
function State({ turn }: { turn: Turn }) {
  const { t, i18n } = useTranslation();
  const { phase } = turn;
  const [text, more] = ((): [string, ReactNode] => {
    switch (phase.is) {
      case 'waiting': {
        const key = `generate.reason_${phase.reason}`;
        const reason = i18n.exists(key) ? t(key as 'generate.reason_no_gpu') : null;
        const connect = phase.reason === 'no_gpu' ? <Link to="/gpus">{t('generate.connect')}</Link> : null;
        return [
          t('generate.state_waitingPlace', { place: phase.place }),
          <>
            {reason} {connect}
          </>,
        ];
      }
      case 'reading':
        return [
          t(turn.ask.kind === 'image' ? 'pictures.state_begun' : 'generate.state_reading', { gpu: phase.gpu }),
          null,
        ];
      case 'writing':
        if (turn.ask.kind === 'image') return [t('pictures.state_drawing'), null];
        return [rate(turn) ? t('generate.state_writingRate', { rate: rate(turn) }) : t('generate.state_writing'), null];
      case 'reconnecting':
        return [t('generate.state_reconnecting'), null];
      default:
        return [t('generate.state_sending'), null];
    }
  })();
  return (
    <div className={css.state}>
      <span className={css.pulse} data-phase={phase.is} aria-hidden="true" />
      <div>
        <div>{text}</div>
        {more ? <div className={css.more}>{more}</div> : null}
      </div>
    </div>
  );
}

/** Tokens a second, once there are enough to tell. */
function rate(turn: Turn): string | null {
  if (turn.firstWordAt === null || turn.lastWordAt === null || turn.tokens < 8) return null;
  const seconds = (turn.lastWordAt - turn.firstWordAt) / 1000;
  return seconds > 0.2
    ? ((turn.tokens - 1) / seconds).toFixed(seconds > 1 && turn.tokens / seconds < 20 ? 1 : 0)
    : null;
}

function Small(props: {
  icon: 'copy' | 'check' | 'retry' | 'edit';
  onClick: () => void;
  children: string;
  disabled?: boolean;
  title?: string;
}) {
  return (
    <Button
      size="compact-sm"
      variant="subtle"
      color="gray"
      leftSection={<Icon name={props.icon} size={16} />}
      onClick={props.onClick}
      disabled={props.disabled}
      title={props.title}
    >
      {props.children}
    </Button>
  );
}
